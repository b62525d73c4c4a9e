"""Sweeps: variants of a configuration, their runs and their table. A config file's sweep() uses these functions."""

from alexnet_jax.sweep.sweep import Variant, grid, seeds, zip_

__all__ = ['Variant', 'grid', 'seeds', 'zip_']
