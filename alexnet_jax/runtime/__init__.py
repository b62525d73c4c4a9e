"""Backend settings, multi-process runs, files, signals and console output."""
