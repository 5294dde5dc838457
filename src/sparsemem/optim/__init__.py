"""Which rows a step changes, and how."""
