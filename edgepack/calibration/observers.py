"""Observers: compute the quantization range of a tensor from its statistics.

Each is a pure function ``(stats, config, levels) -> (low, high)``, ``levels`` being the number of steps of
the integer type (255 for 8 bits). ``OBSERVERS`` has those that the recipe's ``observer`` key may name.
"""

from collections.abc import Callable, Mapping
from typing import get_args

import numpy as np
import numpy.typing as npt

from edgepack.calibration.effective_range import Function
from edgepack.calibration.histogram import StreamingHistogram, TensorStats
from edgepack.config import recipe
from edgepack.config.recipe import Calibration

Bounds = tuple[float, float]
Observer = Callable[[TensorStats, Calibration, int], Bounds]
Doubles = npt.NDArray[np.float64]

# Candidate shares of an end in one search; two searches in a row reach a hundredth.
_SHARES = np.linspace(1.0, 0.1, 91)
_SEARCHES = 2
# With an effective range most of the span may be cut: the ends depend on each other more.
_SEARCHES_EFFECTIVE = 3
# Number of thresholds that the entropy observer compares.
_THRESHOLDS = 256


def minmax(stats: TensorStats, config: Calibration, levels: int) -> Bounds:
    """The extremes over all samples."""
    return stats.minimum, stats.maximum


def moving_average(stats: TensorStats, config: Calibration, levels: int) -> Bounds:
    """Exponential moving average of each sample's extremes (Jacob et al., 2018, section 3.1).

    The only observer whose result depends on the order of the samples.
    """
    return stats.average_minimum, stats.average_maximum


def percentile(stats: TensorStats, config: Calibration, levels: int) -> Bounds:
    """The range that leaves ``100 - percentile`` percent of all values outside, on either side.

    As ``numpy.percentile`` with ``method="lower"`` for the low end and ``"higher"`` for the high end, rounded
    outwards to the edge of a bin, but not beyond the extremes.
    """
    histogram = stats.histogram
    up_to = np.cumsum(histogram.counts)
    outside = int((up_to[-1] - 1) * (100 - config.percentile) / 100)
    first, last = np.searchsorted(up_to, [outside, up_to[-1] - 1 - outside], side="right")
    low = (histogram.first + int(first)) * histogram.width
    high = (histogram.first + int(last) + 1) * histogram.width
    return max(low, stats.minimum), min(high, stats.maximum)


def mse(stats: TensorStats, config: Calibration, levels: int) -> Bounds:
    """The clipped range with the least expected squared error of rounding and clipping.

    Both ends are searched in turn, since tensors are rarely symmetric (Banner et al., 2019, treat the
    symmetric case in closed form; the histogram needs no assumption on the distribution). Where all consumers
    are functions of one variable, the error is that of their outputs (:mod:`.effective_range`).
    """
    low, high = min(stats.minimum, 0.0), max(stats.maximum, 0.0)
    occupied = stats.histogram.counts > 0
    values, counts = stats.histogram.centers[occupied], stats.histogram.counts[occupied]
    functions = stats.consumer_functions
    searches = _SEARCHES_EFFECTIVE if functions else _SEARCHES
    for _ in range(searches):
        if high > 0:
            ends = high * _SHARES
            errors = squared_error(np.full_like(ends, low), ends, values, counts, levels, functions)
            high = float(ends[np.argmin(errors)])
        if low < 0:
            ends = low * _SHARES
            errors = squared_error(ends, np.full_like(ends, high), values, counts, levels, functions)
            low = float(ends[np.argmin(errors)])
    return low, high


def squared_error(
    lows: Doubles,
    highs: Doubles,
    values: Doubles,
    counts: npt.NDArray[np.int64],
    levels: int,
    functions: tuple[Function, ...] = (),
) -> Doubles:
    """Summed squared quantization error of ``values``, each ``counts`` times, for each range.

    With ``functions`` the error is that of their outputs, summed over functions.
    """
    steps = ((highs - lows) / levels)[:, None]
    zeros = np.rint(-lows[:, None] / steps)
    error = values / steps
    np.rint(error, out=error)
    np.clip(error, -zeros, levels - zeros, out=error)
    error *= steps
    if functions:
        return np.asarray(sum(((f(error) - f(values)) ** 2 @ counts.astype(np.float64)) for f in functions))
    error -= values
    error *= error
    return np.asarray(error @ counts.astype(np.float64))


def entropy(stats: TensorStats, config: Calibration, levels: int) -> Bounds:
    """The clipped range whose quantized distribution loses the least information (Kullback-Leibler).

    The threshold search over magnitudes of Migacz (2017): values outside are counted at the edge, bins
    inside are merged into quantization levels and spread again over the occupied bins. Here the counts are
    smoothed first: merging bins evens out sampling noise and spikes of repeated values, which the divergence
    counts as a loss that grows with the range, so that it would clip too much.
    """
    if stats.minimum == stats.maximum == 0.0:
        return 0.0, 0.0
    masses, width = _magnitudes(stats.histogram)
    two_sided = stats.minimum < 0 < stats.maximum
    if not two_sided:
        # The zeros of a Relu have no influence on the threshold, and would dominate the divergence.
        masses[0] = 0.0
    steps = (levels + 1) // 2 if two_sided else levels
    if len(masses) <= steps or not masses.any():
        return stats.minimum, stats.maximum
    used = np.unique(np.linspace(steps, len(masses), _THRESHOLDS).astype(np.intp))
    best = int(used[np.argmin(divergences(smoothed(masses, len(masses) // steps), used, steps))])
    threshold = best * width
    low, high = max(stats.minimum, -threshold), min(stats.maximum, threshold)
    # All values may lie in the bin that the threshold ends in.
    return min(low, high), max(low, high)


def divergences(masses: Doubles, used: npt.NDArray[np.intp], steps: int) -> Doubles:
    """Divergence of ``masses`` [bins], clipped to its first ``used`` [n] bins, from its ``steps`` levels.

    ``KL(p, q) = Σ pᵢ log(pᵢ / qᵢ)`` over occupied bins, where q of a bin is the mass of its level over the
    occupied bins of that level. All sums are differences of running sums, so n thresholds cost no more than
    n × steps operations. Where values outside are clipped to an empty level, q has one bin there;
    where nothing is inside, the divergence is infinite.
    """
    occupied = masses > 0
    mass, bins, m_log_m = (
        np.concatenate([[0.0], np.cumsum(x)]) for x in (masses, occupied, _x_log_x(masses, masses))
    )
    last = masses[used - 1]
    outside = mass[-1] - mass[used]
    # Bin i of n belongs to level i * steps // n: the first bin of level j is ceil(j * n / steps).
    edges = -(-np.arange(steps + 1) * used[:, None] // steps)
    level_mass, level_bins = np.diff(mass[edges]), np.diff(bins[edges])
    edge_is_new = (outside > 0) & (last == 0)
    level_bins[:, -1] += edge_is_new
    mean = level_mass / np.maximum(level_bins, 1)
    # Σ m log(m / mean): within the levels; then the values outside, added to the last bin.
    inside = m_log_m[used] - _x_log_x(level_mass, mean).sum(1)
    edge, edge_mean = last + outside, mean[:, -1]
    empty = (outside > 0) & (edge_mean == 0)
    edge_mean = np.where(edge_mean > 0, edge_mean, 1.0)
    added = _x_log_x(edge, edge / edge_mean) - _x_log_x(last, last / edge_mean)
    total, kept = mass[-1], mass[used]
    found = (inside + added) / total + np.log(np.maximum(kept + empty, 1.0) / total)
    return np.where(kept > 0, found, np.inf)


def smoothed(masses: Doubles, reach: int) -> Doubles:
    """Mean of ``masses`` [bins] over ``reach`` bins to either side, mirrored at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(np.pad(masses, reach, mode="symmetric"))])
    window = 2 * reach + 1
    return np.asarray((sums[window:] - sums[:-window]) / window)


def _x_log_x(x: Doubles, y: Doubles) -> Doubles:
    """``x log y``; 0 where x is 0."""
    return np.asarray(x * np.log(np.where(x > 0, y, 1.0)))


def _magnitudes(histogram: StreamingHistogram) -> tuple[Doubles, float]:
    """Counts by magnitude, in bins from zero (an edge of the histogram) on, and their width."""
    numbers = histogram.first + np.arange(len(histogram.counts))
    magnitudes = np.where(numbers < 0, -1 - numbers, numbers)
    # Limits the number of bins of a narrow distribution far from zero.
    shift = max(int(magnitudes.max()).bit_length() - (2 * histogram.bins - 1).bit_length(), 0)
    masses = np.bincount(magnitudes >> shift, weights=histogram.counts)
    return np.asarray(masses, np.float64), histogram.width * 2**shift


OBSERVERS: Mapping[str, Observer] = {name: globals()[name] for name in get_args(recipe.Observer)}
"""Observers by name; the names are defined in the recipe, which rejects others."""
WITHOUT_HISTOGRAM = frozenset({"minmax", "moving_average"})
"""Observers that need only extremes: no histogram is counted for them."""
