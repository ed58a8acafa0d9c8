"""Preparation: normalization and rewrites for one target, before the other stages."""

from dataclasses import replace

import onnx_ir as ir

from edgepack.config.target import Target
from edgepack.graph.normalize import normalize
from edgepack.graph.notes import NormalizeNotes
from edgepack.graph.pad_channels import pad_depthwise


def prepare(original: ir.Model, target: Target) -> tuple[ir.Model, NormalizeNotes]:
    """The normalized model, with rewrites for the target's kernels, and notes of what was changed.

    Raises:
        ModelError: see :func:`edgepack.graph.normalize.normalize`.
    """
    model, notes = normalize(original, min_opset=target.min_opset, max_opset=target.max_opset)
    wide, count = pad_depthwise(model, target.quantization.depthwise_channels_multiple)
    if count:
        notes = replace(notes, applied={**notes.applied, "pad_depthwise": count})
    return wide, notes
