"""The command `predict`: classes of image files."""
