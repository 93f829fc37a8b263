"""Studies of accuracy on the bundled CLIP."""
