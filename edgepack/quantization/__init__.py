"""Post-training quantization: fusion groups, the plan, rounded weights, the rewritten graph.

In: a normalized float model, calibrated ranges, a target. Out: a plan (``plan/``: all decisions, no change to
the graph), integer weights (``weights/``: scales, rounding, GPTQ, bias correction, SmoothQuant, cross-layer
equalization) and a model with Q/DQ or integer operators (``rewrite/``: all changes to the graph, no
decisions). ``groups`` finds the nodes that a runtime fuses into one kernel.
"""
