"""Rewriting a float graph by a plan: Q/DQ pairs, dynamic products, stored weights, kernel substitutions."""
