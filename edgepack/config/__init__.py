"""Validated configuration: recipes, targets, passes, training settings.

In: YAML and command-line values. Out: frozen pydantic models; unknown keys, wrong types and invalid
combinations are refused with file, key and suggestion.
"""
