"""Optimizers for value rows: which rows a step changes, and how."""
