"""Trained models: finding, restoring and applying them."""
