"""Differentiable ONNX operators on torch, one module for each family; ``table`` lists them by type."""
