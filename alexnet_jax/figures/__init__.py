"""Figures of a trained network as in the paper, for screen and print. Drawing needs NumPy arrays only, no JAX."""
