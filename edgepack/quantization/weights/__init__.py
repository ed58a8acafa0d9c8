"""Weight quantization: scales and integers of every weight.

``params`` chooses scales, ``group_params`` those of one fusion group; ``rounding`` rounds to nearest or
with ``gptq``; ``bias_correction`` corrects biases. ``moments`` measures the inputs of weights;
``sequential`` does so layer by layer, behind quantized layers. ``cross_layer_equalization`` and
``smoothquant`` scale channels before.
"""
