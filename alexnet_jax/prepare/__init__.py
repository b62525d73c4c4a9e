"""The command `prepare`: raw images to a prepared data set."""
