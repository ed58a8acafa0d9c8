"""Training of ONNX graphs on torch: the graph stays the user's, only its weights change.

Needs the extra ``tune``. Nothing outside of this package imports torch.
"""
