"""``onnx_ir`` models: reading, writing, constants, names, fingerprints, and the numerics of quantization.

In: files or models. Out: models, arrays, digests. ``numerics`` and ``scheme`` hold the arithmetic and types
of quantization that all packages share.
"""
