"""Varying power of a model's outputs: their power around their means over the samples.

SQNR counts the whole output as signal. The boxes of a detector mostly depend on their cells, a rating is
mostly the mean rating: 40 dB of such an output may be due to its constant part. Noise is therefore also
compared with the variance of each value over the samples, as in the coefficient of determination (R² = 1 -
noise / variance); a model that always outputs the mean has 0 dB.
"""

from collections.abc import Sequence

import numpy as np

from edgepack.evaluation.differences import compared_outputs
from edgepack.ir.arrays import Array
from edgepack.runtime.runner import Outputs

ROUNDING = 1e-13
"""Share of the power of an output below which a variation is float32 rounding."""


def varying_power(outputs: Sequence[Outputs]) -> float:
    """Power of the compared outputs over all samples around their means; unbiased for few samples.

    Each element of an output has its own mean, ``[N, C, H, W]`` of them over samples of that shape. Elements
    along an axis whose size differs between samples share a mean; with a single sample its rows do, or all of
    its elements where it has one row. An output that is equal for all samples adds nothing; where none
    varies, the whole power is returned. Elements of discrete outputs have no mean and count one each.
    """
    names, real = compared_outputs(outputs[0]) if outputs else ([], True)
    if not real:
        return float(sum(sample[name].size for sample in outputs for name in names))
    varying = whole = 0.0
    for name in names:
        own, total = _around_means([sample[name] for sample in outputs])
        varying, whole = varying + own, whole + total
    return varying or whole


def _around_means(arrays: Sequence[Array]) -> tuple[float, float]:
    """Power around the means, and the whole power, of one output over all samples."""
    axes = _shared_axes(arrays)
    if axes is None:
        arrays, axes = [array.reshape(-1) for array in arrays], (0,)
    count = sum(int(np.prod([array.shape[axis] for axis in axes])) for array in arrays)
    if not count:
        return 0.0, 0.0
    mean = sum((_finite(array).sum(axes, keepdims=True) for array in arrays), start=np.float64(0)) / count
    power = sum(float(((_finite(array) - mean) ** 2).sum()) for array in arrays)
    whole = power + count * float((mean**2).sum())
    if count < 2 or power <= ROUNDING * whole:
        return 0.0, whole
    return power * count / (count - 1), whole


def _shared_axes(arrays: Sequence[Array]) -> tuple[int, ...] | None:
    """The axes along which elements share a mean; ``None`` where all do."""
    shapes = {array.shape for array in arrays}
    if len({len(shape) for shape in shapes}) > 1:
        return None
    shape = arrays[0].shape
    if len(arrays) == 1:
        return (0,) if shape and shape[0] > 1 else None
    return tuple(axis for axis in range(len(shape)) if len({other[axis] for other in shapes}) > 1)


def _finite(array: Array) -> Array:
    """As float64 with zero for elements that are not finite, which so do not count as signal."""
    wide = array.astype(np.float64)
    return wide if np.isfinite(wide).all() else np.where(np.isfinite(wide), wide, 0.0)
