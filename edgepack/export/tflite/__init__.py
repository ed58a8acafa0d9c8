"""Lowering of a quantization plan to a ``.tflite`` file.

``export`` is the entry; ``planning`` makes the plan for LiteRT's kernels, ``convert`` maps ONNX operators to
the functions that lower them. One module lowers one family: ``concat``, ``elementwise``, ``linear``, ``move``
(Reshape, Transpose, Slice, Pad), ``pool``, ``reduce``. ``lowering`` keeps which tensor holds which value,
``layout`` the order of axes, ``flatbuffer`` writes the bytes.
"""
