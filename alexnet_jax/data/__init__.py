"""Prepared data sets and their batches."""
