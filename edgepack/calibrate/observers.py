"""Observers: how the statistics of a tensor become the range that its integers cover.

Each is a pure function ``(stats, config, levels) -> (low, high)``, ``levels`` being the number of steps of
the integer type (255 for 8 bits). ``OBSERVERS`` is the table that the recipe's ``observer`` key selects from.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgepack.calibrate.histogram import StreamingHistogram, TensorStats
from edgepack.config import Calibration

Bounds = tuple[float, float]
Observer = Callable[[TensorStats, Calibration, int], Bounds]

# Shares of the full range that the searching observers try.
_SHARES = np.linspace(1.0, 0.1, 91)


def minmax(stats: TensorStats, config: Calibration, levels: int) -> Bounds:
    """The extremes over all samples."""
    return stats.minimum, stats.maximum


def moving_average(stats: TensorStats, config: Calibration, levels: int) -> Bounds:
    """Exponential moving average of each sample's extremes (Jacob et al., 2018, section 3.1)."""
    return stats.average_minimum, stats.average_maximum


def percentile(stats: TensorStats, config: Calibration, levels: int) -> Bounds:
    """The values that leave ``100 - percentile`` percent of the mass outside, on either side."""
    histogram = stats.histogram
    mass = np.cumsum(histogram.counts)
    outside = mass[-1] * (1 - config.percentile / 100)
    # The edges of the bins in which the tails end, never beyond what was seen.
    low = histogram.low + int(np.searchsorted(mass, outside, side="right")) * histogram.width
    high = histogram.low + (int(np.searchsorted(mass, mass[-1] - outside, side="left")) + 1) * histogram.width
    return max(low, stats.minimum), min(high, stats.maximum)


def mse(stats: TensorStats, config: Calibration, levels: int) -> Bounds:
    """The clipped range with the least expected squared error of rounding and clipping.

    Both ends are searched in turn, since tensors are rarely symmetric (Banner et al., 2019, treat the
    symmetric case in closed form; the histogram needs no assumption on the distribution).
    """
    low, high = min(stats.minimum, 0.0), max(stats.maximum, 0.0)
    centers, counts = _occupied(stats.histogram)
    for _ in range(2):
        if high > 0:
            high = _best(lambda x, low=low: (low, x), high, centers, counts, levels)  # type: ignore[misc]
        if low < 0:
            low = _best(lambda x, high=high: (x, high), low, centers, counts, levels)  # type: ignore[misc]
    return low, high


def entropy(stats: TensorStats, config: Calibration, levels: int) -> Bounds:
    """The clipped range whose quantized distribution loses the least information (Kullback-Leibler).

    The threshold search over magnitudes of Migacz (2017): values outside are counted at the edge, the
    inside is merged into the integer's levels and spread again over the bins that were occupied.
    """
    histogram = stats.histogram
    centers, counts = histogram.centers, histogram.counts
    peak = max(abs(stats.minimum), abs(stats.maximum))
    if peak == 0.0:
        return stats.minimum, stats.maximum
    two_sided = stats.minimum < 0 < stats.maximum
    magnitude_bins = histogram.bins
    index = np.minimum((np.abs(centers) / peak * magnitude_bins).astype(np.intp), magnitude_bins - 1)
    magnitudes = np.bincount(index, weights=counts, minlength=magnitude_bins).astype(np.float64)
    # Zeros of a ReLU say nothing about where to clip, and would dominate the divergence.
    magnitudes[0] = 0 if not two_sided else magnitudes[0]
    steps = (levels + 1) // 2 if two_sided else levels
    best_bins, best = magnitude_bins, np.inf
    for used in range(steps, magnitude_bins + 1, max(1, magnitude_bins // 256)):
        divergence = _divergence(magnitudes, used, steps)
        if divergence < best:
            best_bins, best = used, divergence
    threshold = peak * best_bins / magnitude_bins
    return max(stats.minimum, -threshold), min(stats.maximum, threshold)


OBSERVERS: dict[str, Observer] = {
    "minmax": minmax,
    "moving_average": moving_average,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
NEEDS_HISTOGRAM = frozenset({"percentile", "entropy", "mse"})


def _occupied(histogram: StreamingHistogram) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    used = histogram.counts > 0
    return histogram.centers[used], histogram.counts[used].astype(np.float64)


def _best(
    bounds: Callable[[float], Bounds],
    end: float,
    centers: npt.NDArray[np.float64],
    counts: npt.NDArray[np.float64],
    levels: int,
) -> float:
    candidates = end * _SHARES
    errors = []
    for candidate in candidates:
        low, high = bounds(float(candidate))
        step = max((high - low) / levels, 1e-30)
        clipped = np.clip(centers, low, high)
        rounded = np.rint(clipped / step) * step
        errors.append(float((counts * (np.clip(rounded, low, high) - centers) ** 2).sum()))
    return float(candidates[int(np.argmin(errors))])


def _divergence(magnitudes: npt.NDArray[np.float64], used: int, steps: int) -> float:
    reference = magnitudes[:used].copy()
    outside = magnitudes[used:].sum()
    occupied = reference > 0
    if not occupied.any():
        return float("inf")
    level = np.arange(used) * steps // used
    level_mass = np.bincount(level, weights=reference, minlength=steps)
    level_bins = np.bincount(level, weights=occupied, minlength=steps)
    spread = np.where(occupied, (level_mass / np.maximum(level_bins, 1))[level], 0.0)
    reference[-1] += outside
    p, q = reference / reference.sum(), spread / spread.sum()
    both = (p > 0) & (q > 0)
    # Mass that the quantized distribution cannot represent costs as much as a very rare event.
    lost = float((p[(p > 0) & (q == 0)]).sum()) * 20.0
    return float((p[both] * np.log(p[both] / q[both])).sum()) + lost
