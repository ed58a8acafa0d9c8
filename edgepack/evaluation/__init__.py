"""How accurate a built model is, and the verdict.

In: model files, evaluation samples, a metric. Out: fidelity, agreement and metric for each model (``check``),
and a line for each limit of the gate (``gate``).
"""
