"""The process: devices, files, signals, console."""
