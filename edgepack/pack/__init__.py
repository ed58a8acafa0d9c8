"""The packed form of a model: one file to ship, entropy-coded, that restores the model byte for byte."""
