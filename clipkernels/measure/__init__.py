"""Speed, memory and fidelity of towers, and the environment that a figure is kept with."""
