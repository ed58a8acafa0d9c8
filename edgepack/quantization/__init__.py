"""Post-training quantization: fusion groups, the plan, rounded weights, the rewritten graph.

In: a normalized float model, calibrated ranges, a target. Out: a plan (``plan/``, decides and touches
nothing), integer weights (``weights/``: scales, rounding, GPTQ, bias correction, SmoothQuant, cross-layer
equalization) and a model with Q/DQ or integer operators (``rewrite/``, touches and decides nothing).
``groups`` finds what a runtime fuses into one kernel.
"""
