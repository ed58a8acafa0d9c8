"""Graph rewriting in float: normalization before quantization, and compaction after it.

In: a model as exported. Out: a model that computes the same in canonical form (constants folded, affine
operators fused into convolutions, half precision as float32), and how often each rule applied. ``rules/``
holds one module for each family of rules.
"""
