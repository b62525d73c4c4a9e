"""The command `audit`: the communication, memory and FLOPs of a training step on a mesh."""
