"""One training run, with any method."""
