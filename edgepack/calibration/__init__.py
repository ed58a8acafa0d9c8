"""Activation ranges, measured on sample data that are streamed one at a time."""
