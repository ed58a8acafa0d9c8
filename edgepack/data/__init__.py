"""Samples: reading, checking, preprocessing, splitting.

In: a folder, an ``.npz`` or ``.npy`` file, images or a Python function (``sources``). Out: ``Samples``,
lazily read, whose arrays fit the model. ``splits`` divides them into calibration, training and evaluation
parts that share nothing; ``augmentation`` makes views of pictures.
"""
