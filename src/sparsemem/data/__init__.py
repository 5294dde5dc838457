"""Load models and datasets by name, and turn records into tokens."""
