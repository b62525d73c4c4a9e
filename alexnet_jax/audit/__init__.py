"""The command `audit`: what a train step costs on a mesh."""
