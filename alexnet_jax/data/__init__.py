"""Image sources and the reading of prepared stores."""
