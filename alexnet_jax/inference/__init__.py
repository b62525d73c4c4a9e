"""Finds, restores and applies trained models."""
