"""Quantization parameters of weights: the axis of per-channel scales, and the scales."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.ir.model import constant
from edgepack.ir.numerics import MIN_SCALE, choose_weight_params
from edgepack.ir.scheme import Granularity, QuantParams, QuantScheme, QuantType
from edgepack.quantization.weights.codebook_scales import codebook_scales_of
from edgepack.quantization.weights.pair_saturation import could_saturate, with_reduced_range


def weight_axis(op_type: str, node: ir.Node) -> int | None:
    """The axis of the output channels of a weight; ``None`` where scales cannot be per channel."""
    if op_type == "Conv":
        return 0
    if op_type == "ConvTranspose":
        group = node.attributes.get("group")
        return 1 if group is None or group.as_int() == 1 else None
    if op_type == "Gemm":
        trans_b = node.attributes.get("transB")
        return 0 if trans_b is not None and trans_b.as_int() else 1
    if op_type == "MatMul":
        return -1
    if op_type == "Gather":
        # The last axis of the table is the last axis of the output, unless it is the one that is gathered.
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        rank = len(shape) if shape is not None else 0
        return -1 if node.attributes.get_int("axis", 0) % max(rank, 1) != rank - 1 else None
    return None


def weight_params(
    node: ir.Node, weight: npt.NDArray[np.float32], scheme: QuantScheme, reduced_range: tuple[bool, ...] = ()
) -> QuantParams:
    """Parameters of the ``weight`` of a node, one scale per output channel where scheme and node allow it.

    Outputs in ``reduced_range`` have seven bits. A weight with codebook scales keeps them.
    """
    axis = weight_axis(node.op_type, node)
    whole = scheme.granularity is Granularity.PER_TENSOR or axis is None
    full = scheme.type is QuantType.INT8 and scheme.bits == 8 and not scheme.reduce_range
    codebook = codebook_scales_of(node) if full and not whole else None
    if codebook is not None and axis is not None:
        zero = np.zeros(codebook.shape, scheme.type.dtype)
        params = QuantParams(scheme.type, codebook, zero, axis % weight.ndim)
        return with_reduced_range(weight, params, scheme, reduced_range)
    params = choose_weight_params(weight, scheme, None if whole or axis is None else axis % weight.ndim)
    return with_reduced_range(weight, params, scheme, reduced_range)


def reduced_range_outputs(
    node: ir.Node, weight: npt.NDArray[np.float32], scheme: QuantScheme
) -> tuple[bool, ...]:
    """Outputs of a dynamic MatMul or Gemm that need seven-bit weights on a target that saturates."""
    return could_saturate(node, weight, weight_params(node, weight, scheme))


def smoothed(
    node: ir.Node, weight: npt.NDArray[np.float32], factors: tuple[float, ...]
) -> npt.NDArray[np.float32]:
    """The weight of a MatMul or Gemm with each input channel multiplied by its SmoothQuant factor."""
    if not factors:
        return weight
    scale = np.asarray(factors, np.float32)
    by_output = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    return weight * (scale if by_output else scale[:, None])


def fit_bias(weight: QuantParams, bias: npt.NDArray[np.float32], x: QuantParams) -> QuantParams:
    """Increase scales of channels so small that the bias would not fit int32, or its scale float32."""
    peak = np.abs(np.broadcast_to(bias.reshape(-1), (max(weight.scale.size, bias.size),)))
    peak = peak if weight.axis is not None else peak.max()
    least = np.maximum(peak / 2.0**30, float(MIN_SCALE)) / float(x.scale)
    scale = np.maximum(weight.scale, least.reshape(weight.scale.shape)).astype(np.float32)
    return QuantParams(weight.type, scale, weight.zero_point, weight.axis)


def added_channels(node: ir.Node, multiple: int) -> int:
    """Channel padding: how many channels of zeros give a dense convolution the target's fast kernel."""
    weight = constant(node.inputs[1]) if node.op_type == "Conv" else None
    if weight is None or node.attributes.get_int("group", 1) != 1 or max(weight.shape[2:]) == 1:
        return 0
    channels = int(weight.shape[1])
    added = -channels % multiple
    return added if added * 2 <= channels else 0
