"""Activation ranges from samples, one sample in memory at a time.

In: a model, samples, names of tensors. Out: a ``RangeTable``, saved as JSON. ``run`` streams activations,
``histogram`` counts their values, ``observers`` compute ranges from the counts.
"""
