"""The ``.epk`` format: entropy-coded models, and pools of models that share stored tensors.

In: model files. Out: one file that restores every byte, and the inverse.
"""
