"""Measure what a model knows and what it has lost."""
