"""Gemm without factors: int8 kernels have neither ``alpha`` nor ``beta``."""

import onnx_ir as ir

from edgepack.graph.rules.rule import DONE, Outcome, Rule
from edgepack.ir.arrays import Array
from edgepack.ir.model import computed, constant_tensor, name_of, new_initializer


def fold_gemm_factors(main: ir.Graph, node: ir.Node) -> Outcome:
    """Fold ``alpha`` into the constant weight and ``beta`` into the constant bias.

    Given::  y = Gemm<alpha=a, beta=b>(x, W, c)     W and c constant
    Result:: y = Gemm(x, a·W, b·c)

    A bias with ``beta = 0`` has no effect and is removed, constant or not; so is ``beta`` without a bias.
    """
    alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if alpha == 1.0 and beta == 1.0:
        return None
    weight = constant_tensor(node.inputs[1])
    if alpha != 1.0 and weight is None:
        return "alpha is a factor of two activations"
    if beta not in (0.0, 1.0) and bias is not None and constant_tensor(bias) is None:
        return "beta is a factor of an activation"
    if alpha != 1.0:
        _scale_input(main, node, 1, alpha)
    if beta == 0.0 and bias is not None:
        node.resize_inputs(2)
    elif beta != 1.0 and bias is not None:
        _scale_input(main, node, 2, beta)
    node.attributes.pop("alpha", None)
    node.attributes.pop("beta", None)
    return DONE


def _scale_input(main: ir.Graph, node: ir.Node, index: int, factor: float) -> None:
    value = node.inputs[index]
    tensor = constant_tensor(value)
    assert value is not None
    assert tensor is not None

    def scaled(array: Array) -> Array:
        product: Array = array * factor
        return product

    folded = new_initializer(main, f"{name_of(value)}_folded", computed(tensor, scaled))
    node.replace_input_with(index, folded)


FACTORS: tuple[Rule, ...] = (Rule("fold_gemm_factors", frozenset({"Gemm"}), fold_gemm_factors),)
