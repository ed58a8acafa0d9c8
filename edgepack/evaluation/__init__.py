"""Accuracy of built models, and the gate.

In: model files, evaluation samples, a metric. Out: for each model its fidelity (signal to noise against the
original's outputs), its agreement (share of equal argmax) and its metric (``check``, ``metrics``), and a
result for each limit of the gate on accuracy, bytes and latency (``gate``).
"""
