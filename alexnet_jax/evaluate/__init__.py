"""The command `evaluate`: errors of checkpoints and ensembles."""
