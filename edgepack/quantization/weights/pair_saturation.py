"""Sums of two u8 × s8 products on x86 without VNNI, and reduced range weights, whose sums fit 16 bits.

There the runtime multiplies with ``vpmaddubsw``: unsigned bytes of the input times signed bytes of the
weight, two neighbours added, ``a0 w0 + a1 w1``, in int16 with saturation. Neighbours are elements 2i and
2i + 1 of the reduction: rows of the weight of a matrix product; for a convolution the input channels of one
kernel position, then those of the next. Depthwise convolutions add in int32. See
docs/decisions/saturation.md.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.ir.numerics import choose_weight_params, quantize
from edgepack.ir.scheme import QuantParams, QuantScheme
from edgepack.quantization.weights.matrix import to_groups

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

PAIRED_OPS = frozenset({"Conv", "MatMul", "Gemm"})
"""Operators with an integer kernel that adds pairs."""
LARGEST_INPUT = 255
LARGEST_WEIGHT = 127
LARGEST_PAIR = 32767
STEP = 1
"""Largest distance of a weight rounded by GPTQ from the nearest integer, with rare exceptions."""


def weight_pairs(node: ir.Node, array: npt.NDArray[np.generic], added_channels: int = 0) -> Integers:
    """Columns of the weight, as :func:`to_groups` gives it, that are added in one sum: [pairs, 2].

    Index -1 stands for a zero: a padded channel, or the partner of an odd last column. Empty where the kernel
    adds no pairs.
    """
    if node.op_type not in PAIRED_OPS:
        return np.zeros((0, 2), np.int64)
    groups, outputs, columns = to_groups(node, array).shape
    order = np.arange(columns)
    if node.op_type == "Conv":
        channels = array.shape[1]
        if channels == 1 and outputs == 1 and groups > 1:
            return np.zeros((0, 2), np.int64)
        by_tap = order.reshape(channels, -1).T
        order = np.pad(by_tap, ((0, 0), (0, added_channels)), constant_values=-1).reshape(-1)
    return np.pad(order, (0, len(order) % 2), constant_values=-1).reshape(-1, 2)


def pair_sums(
    rows: npt.NDArray[np.integer], peaks: npt.NDArray[np.integer], pairs: Integers, step: int = 0
) -> Integers:
    """The largest magnitude of each sum of two products: [groups, outputs, pairs].

    ``rows`` are stored weights [groups, outputs, K], each of which may still change by ``step``; ``peaks``
    [groups, K] are the largest inputs. A sum is largest where the inputs of weights of the other sign are
    zero.
    """
    most = peaks[:, None].astype(np.int64)
    largest = np.zeros((*rows.shape[:2], len(pairs)), np.int64)
    for signed in (rows.astype(np.int64), -rows.astype(np.int64)):
        products = np.clip(signed + step, 0, LARGEST_WEIGHT) * most
        sums = np.pad(products, ((0, 0), (0, 0), (0, 1)))[:, :, pairs].sum(-1)
        largest = np.maximum(largest, sums)
    return largest


def could_saturate(
    node: ir.Node, weight: Floats, params: QuantParams, added_channels: int = 0
) -> tuple[bool, ...]:
    """Which outputs could saturate on some input, by the weight alone; empty where none could."""
    rows = to_groups(node, quantize(weight, params))
    pairs = weight_pairs(node, weight, added_channels)
    worst = pair_sums(rows, np.full((len(rows), rows.shape[2]), LARGEST_INPUT), pairs, STEP)
    return outputs_beyond(worst)


def outputs_beyond(sums: Integers) -> tuple[bool, ...]:
    """Which outputs have a sum beyond 16 bits, by :func:`pair_sums`; empty where none has."""
    beyond = (sums.max(-1, initial=0) > LARGEST_PAIR).reshape(-1)
    return tuple(beyond.tolist()) if beyond.any() else ()


def with_reduced_range(
    weight: Floats, params: QuantParams, scheme: QuantScheme, reduced_range: tuple[bool, ...]
) -> QuantParams:
    """``params`` with seven bits for the outputs in ``reduced_range``; for all, where they share one scale.

    Seven bits never saturate: ``2 · 63 · 255 < 32768``.
    """
    if not any(reduced_range):
        return params
    fewer = choose_weight_params(weight, replace(scheme, reduce_range=True), params.axis)
    return (
        fewer
        if params.axis is None
        else replace(params, scale=np.where(reduced_range, fewer.scale, params.scale))
    )


def rows_with_reduced_range(rows: Floats, params: QuantParams, scheme: QuantScheme) -> QuantParams:
    """The same for a weight [outputs, K] of a recurrent operator, by the weight alone."""
    pairs = np.pad(np.arange(rows.shape[1]), (0, rows.shape[1] % 2), constant_values=-1).reshape(-1, 2)
    stored = quantize(rows, params)[None]
    sums = pair_sums(stored, np.full((1, rows.shape[1]), LARGEST_INPUT), pairs, STEP)
    return with_reduced_range(rows, params, scheme, outputs_beyond(sums))
