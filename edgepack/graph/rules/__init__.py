"""Rewriting rules of normalization: pattern, check, rewrite; each docstring shows Given and Result."""
