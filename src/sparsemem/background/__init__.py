"""What general text says: access counts, calibration, scopes."""
