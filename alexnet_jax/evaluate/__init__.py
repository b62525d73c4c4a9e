"""The command `evaluate`, which computes the errors of checkpoints and ensembles."""
