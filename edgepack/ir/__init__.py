"""Models as ``onnx_ir`` models: reading, writing, constants, names, identity, numerics of quantization.

In: files or models. Out: models, arrays, digests. ``numerics`` and ``scheme`` hold the arithmetic and types
of quantization that all rooms share.
"""
