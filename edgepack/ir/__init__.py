"""The room ir."""
