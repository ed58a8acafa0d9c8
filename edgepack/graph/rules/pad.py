"""Pad in the form that every runtime carries out."""

import numpy as np
import onnx_ir as ir

from edgepack.graph.rules.rule import DONE, Outcome, Rule
from edgepack.ir.model import constant, name_of, new_initializer


def pad_all_axes(main: ir.Graph, node: ir.Node) -> Outcome:
    """Give the amounts of all axes, not of some: onnxruntime 1.32's transpose optimizer ignores ``axes``.

    Given::  Pad(x, pads=[1, 2, 3, 4], axes=[2, 3])                 x has four dimensions
    Result:: Pad(x, pads=[0, 0, 1, 2, 0, 0, 3, 4])
    """
    x, axes_value = node.inputs[0], node.inputs[3] if len(node.inputs) > 3 else None
    if axes_value is None or x is None or x.shape is None:
        return None
    axes, pads = constant(axes_value), constant(node.inputs[1])
    if axes is None or pads is None:
        return "its axes or amounts are computed at run time"
    rank, count = len(x.shape), axes.size
    whole = np.zeros(2 * rank, np.int64)
    for place, axis in enumerate(axes.tolist()):
        whole[axis % rank] = pads[place]
        whole[axis % rank + rank] = pads[place + count]
    node.replace_input_with(1, new_initializer(main, f"{name_of(node.inputs[1])}_all", whole))  # type: ignore[arg-type]
    node.resize_inputs(3)
    return DONE


ALL_AXES: tuple[Rule, ...] = (Rule("pad_all_axes", frozenset({"Pad"}), pad_all_axes),)
