"""Artifacts: the quantized model as ``.onnx``, ``.ort``, ``.tflite`` and ``.epk`` files.

In: the selected model, its plan, its rounded weights. Out: files, and the reason for each optional format
that cannot be written. ``artifacts`` writes all formats of a target, ``tflite/`` lowers a plan to the
``.tflite`` schema.
"""
