"""The room weights."""
