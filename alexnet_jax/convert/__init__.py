"""The command `convert`: weights of other programs in, exchange formats out."""
