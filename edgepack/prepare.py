"""Prepare: the model as the stages after it work on it, for one target."""

import onnx_ir as ir

from edgepack.normalize import normalize
from edgepack.target import Target
from edgepack.widen import widen_depthwise


def prepare(original: ir.Model, target: Target) -> tuple[ir.Model, dict[str, int]]:
    """The normalized model with what makes the target's kernels fast, and how often each rule applied.

    Raises:
        ModelError: see :func:`edgepack.normalize.normalize`.
    """
    model, report = normalize(original, min_opset=target.min_opset, max_opset=target.max_opset)
    wide, count = widen_depthwise(model, target.quantization.depthwise_channels_multiple)
    applied = dict(report.applied)
    if count:
        applied["widen_depthwise"] = count
    return wide, applied
