"""Training of the ONNX graph itself on torch: distillation, sparsity, quantization-aware training.

In: a model, its teacher, samples and settings. Out: the model with the same nodes and new weights.
Only this package imports torch (the extra ``tune``). ``operators/`` has the differentiable ONNX operators.
"""
