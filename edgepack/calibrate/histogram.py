"""What is remembered of one activation tensor: a few numbers and one histogram that grows."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(slots=True)
class StreamingHistogram:
    """Counts of values in equal bins over ``[low, low + bins * width)``; the range doubles when it must.

    Doubling merges neighbouring bins, so counts stay exact and memory stays constant whatever the number,
    the shapes and the order of the arrays: the result depends on the values alone up to the first range.
    """

    bins: int
    low: float = 0.0
    width: float = 0.0
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def high(self) -> float:
        """Upper edge of the last bin."""
        return self.low + self.bins * self.width

    @property
    def centers(self) -> npt.NDArray[np.float64]:
        """Middle of each bin."""
        return self.low + (np.arange(self.bins) + 0.5) * self.width

    def add(self, x: Floats, x_min: float, x_max: float) -> None:
        """Count the finite values ``x`` (any shape), whose extremes the caller already knows."""
        if self.width == 0.0:
            self.counts = np.zeros(self.bins, np.int64)
            self.low = x_min
            # A constant first array has no width: start narrow, growing is cheap.
            self.width = max(
                (x_max - x_min) / self.bins * (1 + 1e-6), np.spacing(np.float32(abs(x_max))), 1e-12
            )
        self._grow(x_min, x_max)
        index = ((x.ravel() - np.float32(self.low)) * np.float32(1 / self.width)).astype(np.intp)
        np.clip(index, 0, self.bins - 1, out=index)
        self.counts += np.bincount(index, minlength=self.bins)

    def _grow(self, x_min: float, x_max: float) -> None:
        half = self.bins // 2
        while x_max > self.high:
            self.counts = np.concatenate([self.counts.reshape(half, 2).sum(1), np.zeros(half, np.int64)])
            self.width *= 2
        while x_min < self.low:
            high = self.high
            self.counts = np.concatenate([np.zeros(half, np.int64), self.counts.reshape(half, 2).sum(1)])
            self.width *= 2
            self.low = high - self.bins * self.width


@dataclass(slots=True)
class TensorStats:
    """Running statistics of one activation tensor over all samples."""

    histogram: StreamingHistogram
    momentum: float
    minimum: float = np.inf
    maximum: float = -np.inf
    average_minimum: float = 0.0
    average_maximum: float = 0.0
    samples: int = 0

    def update(self, x: Floats, *, with_histogram: bool) -> None:
        """Take in one sample's array, any shape; an empty array changes nothing.

        Raises:
            ValueError: the array holds NaN or infinity.
        """
        if x.size == 0:
            return
        x_min, x_max = float(x.min()), float(x.max())
        if not (np.isfinite(x_min) and np.isfinite(x_max)):
            raise ValueError("holds NaN or infinity")
        self.minimum, self.maximum = min(self.minimum, x_min), max(self.maximum, x_max)
        keep = self.momentum if self.samples else 0.0
        self.average_minimum = keep * self.average_minimum + (1 - keep) * x_min
        self.average_maximum = keep * self.average_maximum + (1 - keep) * x_max
        self.samples += 1
        if with_histogram:
            self.histogram.add(x, x_min, x_max)
