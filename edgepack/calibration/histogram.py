"""Statistics of one activation tensor: extremes, averages and a growing histogram."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.calibration.effective_range import Function

Floats = npt.NDArray[np.float32]

COARSE = 128
"""Largest number of bins that are kept, for plots, once the range is chosen."""

CHUNK = 1 << 15
"""Values binned at a time: they fit in the L2 cache, which is twice as fast as whole arrays."""
FINEST = -100
"""Exponent of the narrowest bin; narrower ones would be subnormal in float32."""
MANTISSA = 23
"""Mantissa bits of float32: a bin is never narrower than the spacing of the largest value."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values in the bins ``[i 2ᵏ, (i + 1) 2ᵏ)``, ``i`` from ``first`` on, ``k`` the exponent."""

    exponent: int
    first: int
    counts: tuple[int, ...]


@dataclass(slots=True)
class StreamingHistogram:
    """Counts of values in bins ``[i 2ᵏ, (i + 1) 2ᵏ)``; the range of all values spans ``bins`` to ``2 bins``.

    Edges are multiples of a power of two: wider bins are unions of narrower ones, values are binned without
    rounding error, and zero is always an edge. Growth therefore only adds counts, and the result does not
    depend on the order, the number or the shapes of the arrays. ``k`` (``exponent``)
    depends on the extremes alone. (Values 2¹⁴⁹ times smaller than a bin lose their sign.) Memory is
    ``16 bins`` bytes.
    """

    bins: int
    exponent: int = FINEST
    first: int = 0
    """Number ``i`` of the first bin of ``counts``."""
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def width(self) -> float:
        """Width of each bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def centers(self) -> npt.NDArray[np.float64]:
        """Center of each bin."""
        return np.asarray((self.first + np.arange(len(self.counts)) + 0.5) * self.width, np.float64)

    def add(self, x: Floats, x_min: float, x_max: float) -> None:
        """Count the finite values ``x`` (any shape, not empty) with extremes ``x_min`` and ``x_max``."""
        self._cover(x_min, x_max)
        flat, scale, first = x.reshape(-1), np.float32(1 / self.width), np.float32(self.first)
        room = np.empty(min(CHUNK, flat.size), np.float32)
        for start in range(0, flat.size, CHUNK):
            chunk = flat[start : start + CHUNK]
            # Exact in float32: a power of two, and integers below 2²⁴.
            scaled = np.multiply(chunk, scale, out=room[: chunk.size])
            np.floor(scaled, out=scaled)
            scaled -= first
            self.counts += np.bincount(scaled.astype(np.intp), minlength=len(self.counts))

    def coarse(self, most: int = COARSE) -> Histogram | None:
        """The counts in at most ``most`` bins, without empty ones at the ends; ``None`` without counts.

        ``most`` is at least two, since zero is always an edge.
        """
        occupied = np.flatnonzero(self.counts)
        if not occupied.size:
            return None
        numbers = self.first + occupied
        shift = 0
        while (int(numbers[-1]) >> shift) - (int(numbers[0]) >> shift) >= most:
            shift += 1
        wide = (numbers >> shift) - (int(numbers[0]) >> shift)
        counts = np.zeros(int(wide[-1]) + 1, np.int64)
        np.add.at(counts, wide, self.counts[occupied])
        return Histogram(self.exponent + shift, int(numbers[0]) >> shift, tuple(counts.tolist()))

    def _cover(self, x_min: float, x_max: float) -> None:
        """Extend ``counts`` to ``[x_min, x_max]``, with wider bins if there would be too many."""
        largest = max(abs(x_min), abs(x_max))
        shift = max(math.frexp(largest)[1] - 1 - MANTISSA - self.exponent, 0) if largest else 0
        while True:
            width = math.ldexp(1.0, self.exponent + shift)
            first, last = math.floor(x_min / width), math.floor(x_max / width)
            if len(self.counts):
                first = min(first, self.first >> shift)
                last = max(last, (self.first + len(self.counts) - 1) >> shift)
            if last - first < 2 * self.bins:
                break
            shift += 1
        if shift == 0 and (first, last) == (self.first, self.first + len(self.counts) - 1):
            return
        counts = np.zeros(last - first + 1, np.int64)
        numbers = self.first + np.arange(len(self.counts))
        # A shift beyond 62 gives 0 or -1, as 62 does: bin numbers are below 2²⁵.
        np.add.at(counts, (numbers >> min(shift, 62)) - first, self.counts)
        self.counts, self.first, self.exponent = counts, first, self.exponent + shift


@dataclass(slots=True)
class TensorStats:
    """Running statistics of one activation tensor over all samples."""

    histogram: StreamingHistogram
    momentum: float
    minimum: float = np.inf
    maximum: float = -np.inf
    average_minimum: float = 0.0
    average_maximum: float = 0.0
    consumer_functions: tuple[Function, ...] = ()
    """The unary functions that consume it; see :mod:`.effective_range`."""
    samples: int = 0

    def update(self, x: npt.NDArray[Any], *, with_histogram: bool) -> None:
        """Add the array of one sample, any shape; an empty array changes nothing.

        Raises:
            ValueError: the array holds NaN or infinity.
        """
        if x.size == 0:
            return
        x = np.asarray(x, np.float32)
        x_min, x_max = float(x.min()), float(x.max())
        if not (np.isfinite(x_min) and np.isfinite(x_max)):
            raise ValueError("holds NaN" if np.isnan(x_min) else "holds infinity")
        self.minimum, self.maximum = min(self.minimum, x_min), max(self.maximum, x_max)
        keep = self.momentum if self.samples else 0.0
        self.average_minimum = keep * self.average_minimum + (1 - keep) * x_min
        self.average_maximum = keep * self.average_maximum + (1 - keep) * x_max
        self.samples += 1
        if with_histogram:
            self.histogram.add(x, x_min, x_max)
