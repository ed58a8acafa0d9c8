"""Adapt what constant folding writes for sequence operators to the opset of the model."""

import onnx_ir as ir

from edgepack.ir.model import constant, walk_nodes

_SPLIT_COUNTS_OPSET = 18
_SIZES_AS_INPUTS_OPSET = 13


def as_the_opset_has_it(model: ir.Model, opset: int) -> None:
    """Rewrite Split and Squeeze, which folding writes as in opset 18, for an older opset.

    Given (opset 13): ``Split <num_outputs = 3> (x)``, three equal outputs. Result: ``Split (x)``, the same.
    Given (opset 12): ``Split (x, sizes)``. Result: ``Split <split = sizes> (x)``; likewise the axes of a
    Squeeze.
    """
    for node in walk_nodes(model.graph):
        if node.op_type == "Split" and opset < _SPLIT_COUNTS_OPSET:
            node.attributes.pop("num_outputs", None)
        name = {"Split": "split", "Squeeze": "axes"}.get(node.op_type)
        if name is None or opset >= _SIZES_AS_INPUTS_OPSET or len(node.inputs) < 2:
            continue
        sizes = constant(node.inputs[1])
        if sizes is not None:
            node.attributes.add(ir.AttrInt64s(name, sizes.tolist()))
            node.resize_inputs(1)
