"""Measurement of a tower's speed, memory and fidelity, and the environment that results are stored with."""
