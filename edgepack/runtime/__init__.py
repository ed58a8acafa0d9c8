"""onnxruntime and LiteRT: opening models, running them, and what the runtime fused.

In: a model file and the runtime settings of a target. Out: a runner with named inputs and outputs; ``fused``
counts integer kernels and leftover Q/DQ.
"""
