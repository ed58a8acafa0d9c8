"""Quantization parameters of the weight of a group at its planned precision."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgepack.config.target import Target
from edgepack.ir.model import constant
from edgepack.ir.scheme import QuantParams, QuantScheme
from edgepack.quantization.groups import RECURRENT_OPS, FusionGroup
from edgepack.quantization.weights.low_bit import LowBit
from edgepack.quantization.weights.params import fit_bias, reduced_range_outputs, smoothed, weight_params


def group_weight_params(
    group: FusionGroup,
    nodes: Mapping[str | None, ir.Node],
    target: Target,
    x: QuantParams | None,
    reduced_range: tuple[bool, ...],
    factors: tuple[float, ...] = (),
    low_bit: LowBit | None = None,
) -> QuantParams | None:
    """Parameters of the stored weight; ``None`` without a weight, and for recurrent operators.

    ``x``: parameters of the input of a static group, so that its bias fits int32.
    """
    node = nodes[group.name]
    source = node.inputs[0] if group.op_type == "Gather" else node.inputs[1] if group.weight else None
    array = constant(source) if source is not None else None
    if array is None or group.op_type in RECURRENT_OPS:
        return None
    scheme = target.quantization.weight
    if low_bit is None:
        params = weight_params(node, smoothed(node, array, factors), scheme, reduced_range)
    else:
        params = low_bit.applied(weight_params(node, array, low_bit.scheme(scheme)))
    if x is None:
        return params
    bias = constant(node.inputs[2]) if group.bias else None
    return fit_bias(params, np.zeros(1, np.float32) if bias is None else bias, x)


def reduced_range_dynamic(
    group: FusionGroup, node: ir.Node, scheme: QuantScheme, factors: tuple[float, ...]
) -> tuple[bool, ...]:
    """Outputs that could saturate: inputs quantized at run time use the full range in every run."""
    array = constant(node.inputs[1]) if group.weight and group.op_type not in RECURRENT_OPS else None
    return () if array is None else reduced_range_outputs(node, smoothed(node, array, factors), scheme)
