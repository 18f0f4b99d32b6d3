"""The audit put to the test: what it watches, calibrated and tallied, and faults planted for it to find."""
