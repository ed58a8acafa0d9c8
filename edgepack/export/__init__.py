"""Artifacts: the quantized model as ``.onnx``, ``.ort``, ``.tflite`` and ``.epk`` files.

In: the selected model, its plan, its rounded weights. Out: files, and for each optional format that the model
has no form of, the reason. ``artifacts`` writes all formats of a target, ``tflite/`` lowers a plan to the
``.tflite`` schema.
"""
