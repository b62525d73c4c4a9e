"""The command `figures`: the figures of the paper from a run."""
