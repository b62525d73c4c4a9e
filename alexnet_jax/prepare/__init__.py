"""The command `prepare`, which converts raw images to a prepared data set."""
