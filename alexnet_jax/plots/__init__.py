"""Drawing functions: arrays in, matplotlib figures out."""
