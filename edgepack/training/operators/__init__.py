"""ONNX operators on torch, one module for each family; ``table`` maps operator types to functions."""
