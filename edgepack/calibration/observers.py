"""Observers: how the statistics of a tensor become the range that its integers cover.

Each is a pure function ``(stats, config, levels) -> (low, high)``, ``levels`` being the number of steps of
the integer type (255 for 8 bits). ``OBSERVERS`` holds those that the recipe's ``observer`` key may name.
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

# Shares of an end that one search tries; two searches in a row reach a hundredth.
_SHARES = np.linspace(1.0, 0.1, 91)
_SEARCHES = 2
# What readers cannot tell apart may be most of the span: the ends depend on each other more.
_SEARCHES_SEEN = 3
# Thresholds that the entropy observer compares.
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
    """The values that leave ``100 - percentile`` percent of all values outside, on either side.

    Of ``numpy.percentile`` with ``method="lower"`` below and ``"higher"`` above, rounded outwards to the edge
    of a bin, but never beyond what was seen.
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
    symmetric case in closed form; the histogram needs no assumption on the distribution). Where all readers
    are functions of one variable, the error is that of what they make of it (:mod:`.seen`).
    """
    low, high = min(stats.minimum, 0.0), max(stats.maximum, 0.0)
    occupied = stats.histogram.counts > 0
    values, counts = stats.histogram.centers[occupied], stats.histogram.counts[occupied]
    searches = _SEARCHES_SEEN if stats.seen else _SEARCHES
    for _ in range(searches):
        if high > 0:
            ends = high * _SHARES
            errors = squared_error(np.full_like(ends, low), ends, values, counts, levels, stats.seen)
            high = float(ends[np.argmin(errors)])
        if low < 0:
            ends = low * _SHARES
            errors = squared_error(ends, np.full_like(ends, high), values, counts, levels, stats.seen)
            low = float(ends[np.argmin(errors)])
    return low, high


def squared_error(
    lows: Doubles,
    highs: Doubles,
    values: Doubles,
    counts: npt.NDArray[np.int64],
    levels: int,
    seen: tuple[Function, ...] = (),
) -> Doubles:
    """Summed squared error of ``values``, each ``counts`` times, on the integer grid of each range.

    With functions ``seen`` the error is that of what they give, summed over them.
    """
    steps = ((highs - lows) / levels)[:, None]
    zeros = np.rint(-lows[:, None] / steps)
    error = values / steps
    np.rint(error, out=error)
    np.clip(error, -zeros, levels - zeros, out=error)
    error *= steps
    if seen:
        return np.asarray(sum(((f(error) - f(values)) ** 2 @ counts.astype(np.float64)) for f in seen))
    error -= values
    error *= error
    return np.asarray(error @ counts.astype(np.float64))


def entropy(stats: TensorStats, config: Calibration, levels: int) -> Bounds:
    """The clipped range whose quantized distribution loses the least information (Kullback-Leibler).

    The threshold search over magnitudes of Migacz (2017): values outside are counted at the edge, the
    inside is merged into the integer's levels and spread again over the bins that were occupied. Here the
    counts are smoothed first: merging bins evens out their sampling noise, and spikes of values that return,
    which the divergence takes for a loss that grows with the range: it would cut ever more off.
    """
    if stats.minimum == stats.maximum == 0.0:
        return 0.0, 0.0
    masses, width = _magnitudes(stats.histogram)
    two_sided = stats.minimum < 0 < stats.maximum
    if not two_sided:
        # Zeros of a Relu say nothing about where to clip, and would dominate the divergence.
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
    n × steps operations. Where the outside comes to lie on an empty level, q has one value there;
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
    # Σ m log(m / mean): within the levels; then what the outside adds to the last bin.
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
    """``x log y``, 0 where x is."""
    return np.asarray(x * np.log(np.where(x > 0, y, 1.0)))


def _magnitudes(histogram: StreamingHistogram) -> tuple[Doubles, float]:
    """Counts by magnitude, in bins from zero on (which is an edge of the histogram), and their width."""
    numbers = histogram.first + np.arange(len(histogram.counts))
    magnitudes = np.where(numbers < 0, -1 - numbers, numbers)
    # A narrow distribution far from zero: no more bins than anywhere else.
    shift = max(int(magnitudes.max()).bit_length() - (2 * histogram.bins - 1).bit_length(), 0)
    masses = np.bincount(magnitudes >> shift, weights=histogram.counts)
    return np.asarray(masses, np.float64), histogram.width * 2**shift


OBSERVERS: Mapping[str, Observer] = {name: globals()[name] for name in get_args(recipe.Observer)}
"""By name. The names stand once, in the recipe, which refuses others before this room is imported."""
WITHOUT_HISTOGRAM = frozenset({"minmax", "moving_average"})
"""Observers that need extremes only: no values are counted for them."""
