"""An adapter or model on disk and on the Hub."""
