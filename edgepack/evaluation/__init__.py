"""Accuracy of built models, and the gate.

In: model files, evaluation samples, a metric. Out: fidelity, agreement and metric for each model (``check``),
and a result for each limit of the gate (``gate``).
"""
