"""The ``.epk`` format: entropy-coded models, and pools that store what models share once.

In: model files. Out: one file that restores every byte, and the inverse.
"""
