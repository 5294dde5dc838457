"""Folders with an adapter or a model, on disk and on the Hub."""
