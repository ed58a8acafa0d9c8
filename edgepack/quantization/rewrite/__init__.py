"""Rewrites a float graph by a plan: Q/DQ pairs, dynamic quantization, stored weights, substitutions."""
