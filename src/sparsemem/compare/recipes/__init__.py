"""Prepared comparisons as plain functions, with the small data files of the demo."""
