"""Rewrite Resize so that every runtime supports it."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.graph.rules.rule import DONE, Outcome, Rule, ints_attribute
from edgepack.ir.model import constant, name_of, new_initializer


def resize_all_axes(main: ir.Graph, node: ir.Node) -> Outcome:
    """Give scales for all axes: onnxruntime 1.32 fails to convert a Resize with ``axes`` to channels last.

    Given::  Resize(x, scales=[2, 2], axes=[2, 3])      x has four dimensions
    Result:: Resize(x, scales=[1, 1, 2, 2])

    Sizes become scales where other axes, such as the batch, are dynamic.
    """
    axes, x = ints_attribute(node, "axes"), node.inputs[0]
    if not axes or x is None or x.shape is None:
        return None
    policy = node.attributes.get("keep_aspect_ratio_policy")
    mode = node.attributes.get("coordinate_transformation_mode")
    if policy is not None and policy.as_string() != "stretch":
        return "it keeps the aspect ratio of some axes"
    if mode is not None and mode.as_string() == "tf_crop_and_resize":
        return "it crops some axes"
    for index in (2, 3):
        value = node.inputs[index] if len(node.inputs) > index else None
        given = constant(value)
        if value is not None and given is None:
            return "scales or sizes are computed at run time"
        if value is None or given is None or not given.size:
            continue
        by_axis = dict(zip((axis % len(x.shape) for axis in axes), given.tolist(), strict=True))
        whole = _whole(by_axis, x.shape, sizes=index == 3)
        if whole is None:
            return "sizes of other axes are unknown"
        full = new_initializer(main, f"{name_of(value)}_all", whole)
        node.replace_input_with(index, None)
        node.replace_input_with(2 if whole.dtype == np.float32 else 3, full)
    node.attributes.pop("axes")
    return DONE


def _whole(
    by_axis: Mapping[int, int | float], shape: ir.Shape, *, sizes: bool
) -> npt.NDArray[np.int64] | npt.NDArray[np.float32] | None:
    """Sizes or scales of all axes; scales instead of sizes if other axes are dynamic."""
    known = [by_axis.get(axis, size) for axis, size in enumerate(shape)]
    if sizes and all(isinstance(size, int) for size in known):
        return np.asarray(known, np.int64)
    scales = np.ones(len(shape), np.float32)
    for axis, number in by_axis.items():
        size = shape[axis]
        scales[axis] = number
        if sizes:
            if not isinstance(size, int):
                return None
            scales[axis] /= np.float32(size)  # in float32, as the runtime computes it
            if {int(scales[axis] * np.float32(size)), int(float(scales[axis]) * size)} != {number}:
                return None  # 7 / 5 is less than 1.4 in float32, and ONNX would infer six
    return scales


RESIZING: tuple[Rule, ...] = (Rule("resize_all_axes", frozenset({"Resize"}), resize_all_axes),)
