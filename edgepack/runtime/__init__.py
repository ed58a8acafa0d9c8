"""onnxruntime and LiteRT: open models, run them, report fusions.

In: a model file and the runtime settings of a target. Out: a runner with named inputs and outputs; ``fused``
counts integer kernels and leftover Q/DQ.
"""
