"""Lowering of a quantization plan to a ``.tflite`` file: operators, layouts, flatbuffer."""
