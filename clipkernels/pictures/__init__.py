"""Pictures: what methods leave of an image, and the files, colours and letters of every picture."""
