"""What a run did to the rows, as a file to apply and revert."""
