"""Training of the ONNX graph itself on torch: distillation, sparsity, quantization-aware training.

In: a model, its teacher, samples and settings. Out: a model with other weights and the same nodes. Only this
room imports torch (the extra ``tune``); ``operators/`` holds the operators that can be trained through.
"""
