"""Models and data sets by name, and records to tokens."""
