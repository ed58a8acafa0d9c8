"""Resize in the form that every runtime carries out."""

import numpy as np
import onnx_ir as ir

from edgepack.model import constant, name_of, new_initializer
from edgepack.rules import DONE, Outcome, Rule, ints_attribute


def resize_all_axes(main: ir.Graph, node: ir.Node) -> Outcome:
    """Speak of all axes, not of some: onnxruntime 1.32 fails to turn the other form to channels last.

    Given::  Resize(x, scales=[2, 2], axes=[2, 3])      x has four dimensions
    Result:: Resize(x, scales=[1, 1, 2, 2])
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
    rank = len(x.shape)
    for index, default in ((2, [1.0] * rank), (3, list(x.shape))):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is None:
            continue
        given = constant(value)
        if given is None:
            return "scales or sizes are computed at run time"
        if not given.size:
            continue
        whole: list[object] = list(default)
        for axis, number in zip(axes, given.tolist(), strict=True):
            whole[axis % rank] = number
        if not all(isinstance(number, int | float) for number in whole):
            return "sizes of other axes are unknown"
        full = new_initializer(main, f"{name_of(value)}_all", np.asarray(whole, given.dtype))
        node.replace_input_with(index, full)
    node.attributes.pop("axes")
    return DONE


RESIZING: tuple[Rule, ...] = (Rule("resize_all_axes", frozenset({"Resize"}), resize_all_axes),)
