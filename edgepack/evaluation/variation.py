"""What of a model's outputs answers to its inputs: their power around their own means over the samples.

Signal to noise takes the whole of an output for signal. Boxes of a detector are mostly where their cells
are, a rating is mostly the mean rating: 40 dB of such an output may be no more than its constant part. Noise
is therefore also held against the variance of each value over the samples, as the coefficient of
determination does (R² = 1 - noise / variance); a model that always gives its mean has 0 dB.
"""

from collections.abc import Sequence

import numpy as np

from edgepack.evaluation.differences import compared_outputs
from edgepack.ir.arrays import Array
from edgepack.runtime.runner import Outputs

ROUNDING = 1e-13
"""Of the power of an output: less than that is how float32 rounds, not what varies."""


def varying_power(outputs: Sequence[Outputs]) -> float:
    """Power of the outputs that count, over all samples, around their means; unbiased for few samples.

    Each place of an output has a mean of its own, ``[N, C, H, W]`` of them over samples of that shape; along
    an axis whose size differs from sample to sample the places share one, and with a single sample its rows,
    or all of its values where it has one row. An output that is the same for all samples adds nothing; where
    none varies, their whole power counts, since there is nothing else to hold noise against. Answers that are
    right or wrong have no mean, and count one each.
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
    """The axes along which places share a mean; ``None`` where all do."""
    shapes = {array.shape for array in arrays}
    if len({len(shape) for shape in shapes}) > 1:
        return None
    shape = arrays[0].shape
    if len(arrays) == 1:
        return (0,) if shape and shape[0] > 1 else None
    return tuple(axis for axis in range(len(shape)) if len({other[axis] for other in shapes}) > 1)


def _finite(array: Array) -> Array:
    """In float64, what is not finite as zero: so it counts as no signal in the whole power too."""
    wide = array.astype(np.float64)
    return wide if np.isfinite(wide).all() else np.where(np.isfinite(wide), wide, 0.0)
