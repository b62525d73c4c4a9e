"""The command `predict`, which classifies images."""
