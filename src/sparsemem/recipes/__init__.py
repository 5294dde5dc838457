"""Run settings as plain functions, and the demo's own small data."""
