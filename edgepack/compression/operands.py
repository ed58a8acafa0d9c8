"""Constant operands of single nodes."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.ir.model import name_of, new_initializer


def replace_operand(graph: ir.Graph, node: ir.Node, index: int, content: npt.NDArray[Any], word: str) -> None:
    """Set operand ``index`` of ``node`` to the constant ``content``; the operand may be new.

    Other consumers of the old constant keep it; without any it is removed. The new name ends in ``word``.
    """
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    old = node.inputs[index]
    base = f"{name_of(node.outputs[0])}_{index}" if old is None else name_of(old).removesuffix(f"_{word}")
    made = new_initializer(graph, f"{base}_{word}", np.ascontiguousarray(content))
    node.replace_input_with(index, made)
    if (
        old is not None
        and not old.uses()
        and not old.is_graph_output()
        and name_of(old) in graph.initializers
    ):
        del graph.initializers[name_of(old)]
