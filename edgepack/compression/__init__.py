"""Passes: what makes a model smaller before it is quantized, on the same calibration data."""
