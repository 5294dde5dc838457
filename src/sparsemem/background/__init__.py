"""Statistics of general text, and what is set from them: calibration and scopes."""
