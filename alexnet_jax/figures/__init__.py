"""Pictures of what a network learned, as in the paper, for screen and print; pure drawing, on NumPy arrays."""
