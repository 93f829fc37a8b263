"""Dense and reduced variants of one tower compared: speed, fidelity and memory, and the one to take."""
