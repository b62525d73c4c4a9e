"""Image sources, prepared stores, and input pipelines."""
