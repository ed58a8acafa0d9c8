"""Samples: reading, checking, preprocessing, splitting.

In: a folder, an ``.npz`` or ``.npy`` file, images or a Python function (``sources``). Out: ``Samples``,
lazily read, whose arrays fit the model. ``splits`` divides them into disjoint calibration, training and
evaluation splits; ``augmentation`` crops, stretches and mirrors images.
"""
