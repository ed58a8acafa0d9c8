"""Activation ranges from samples, one sample in memory at a time.

In: a model, samples, names of tensors. Out: a ``RangeTable``, saved as JSON. ``run`` streams activations,
``histogram`` counts them, ``observers`` turn counts into ranges.
"""
