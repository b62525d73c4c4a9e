"""The command `convert`: imports weights of other frameworks and exports checkpoints to exchange formats."""
