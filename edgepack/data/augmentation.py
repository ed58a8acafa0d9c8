"""Image augmentation: random crops, stretched and mirrored, for training and pruning on few images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgepack.data.samples import Samples
from edgepack.data.sources import Source
from edgepack.errors import ConfigError
from edgepack.ir.arrays import Array, Feeds

LEAST_AREA = 0.35
"""Smallest area of a crop, as a share of the image."""
MOST_STRETCH = 1.28
"""Largest factor by which a crop changes the aspect ratio."""
CHANNELS = (1, 3, 4)
PICTURE_RANK = 4


def augmented(samples: Samples, count: int, seed: int) -> Samples:
    """``samples``, each followed by ``count`` augmented copies: crops of the image, mirrored or not.

    Inputs that are not images are unchanged. The copies depend only on the seed and the index of the sample,
    so each iteration gives the same ones. They are cropped after preprocessing: each is an input that the
    model could have received.

    Raises:
        ConfigError: the model has no image input.
    """
    if not count:
        return samples
    axes = {name: found for name, a in next(iter(samples)).feeds.items() if (found := _plane(a)) is not None}
    if not axes:
        names = ", ".join(spec.name for spec in samples.inputs)
        raise ConfigError(
            f"views: none of the inputs ({names}) is a float picture with 1, 3 or 4 channels; remove the key"
        )
    numbers = samples.indices
    origin, labels = samples.origin, samples.labels
    views = Source(
        keys=tuple(origin.keys[n] + (f", view {v}" if v else "") for n in numbers for v in range(count + 1)),
        stream=_Augmented(samples, count, seed, axes),
        labels=None if labels is None else tuple(label for label in labels for _ in range(count + 1)),
        preprocessing=f"{origin.preprocessing} {count} views, seed {seed}",
    )
    return replace(samples, origin=views, indices=tuple(range(len(views.keys))))


def _plane(array: Array) -> tuple[int, int] | None:
    """The axes of height and width of an image."""
    if array.ndim != PICTURE_RANK or array.dtype.kind != "f" or min(array.shape) == 0:
        return None
    if array.shape[1] in CHANNELS:
        return 2, 3
    return (1, 2) if array.shape[3] in CHANNELS else None


@dataclass(frozen=True, slots=True)
class _Augmented:
    samples: Samples
    count: int
    seed: int
    axes: dict[str, tuple[int, int]]

    def __call__(self, indices: Sequence[int]) -> Iterator[Feeds]:
        """Each image is read once for all of its augmented copies that are requested in a row."""
        wanted = list(dict.fromkeys(i // (self.count + 1) for i in indices))
        originals = self.samples.indices
        read = iter(replace(self.samples, indices=tuple(originals[n] for n in wanted)))
        last, feeds = -1, Feeds()
        for index in indices:
            number, view = divmod(index, self.count + 1)
            if number != last:
                last, feeds = number, next(read).feeds
            yield self._augment(feeds, originals[number], view) if view else feeds

    def _augment(self, feeds: Feeds, number: int, view: int) -> Feeds:
        rng = np.random.default_rng((self.seed, number, view))
        area, stretch = rng.uniform(LEAST_AREA, 1), np.exp(rng.uniform(-1, 1) * np.log(MOST_STRETCH))
        sides = np.minimum(np.sqrt([area * stretch, area / stretch]), 1)
        starts = rng.uniform(size=2) * (1 - sides)
        mirrored = rng.random() < 1 / 2  # all inputs are cropped to the same region
        cropped = dict(feeds)
        for name, plane in self.axes.items():
            array = feeds[name]
            for axis, start, side in zip(plane, starts, sides, strict=True):
                array = _stretched(array, axis, start, side)
            cropped[name] = np.ascontiguousarray(np.flip(array, plane[1]) if mirrored else array)
        return cropped


def _stretched(array: Array, axis: int, start: float, side: float) -> npt.NDArray[np.floating]:
    """The section of an axis from ``start`` with length ``side``, both as shares, resized to the axis's size.

    Linear interpolation between pixels, with half-pixel centres.
    """
    size = array.shape[axis]
    at = np.clip((start + (np.arange(size) + 0.5) / size * side) * size - 0.5, 0, size - 1)
    low = at.astype(np.intp)
    high = np.minimum(low + 1, size - 1)
    part = (at - low).astype(array.dtype).reshape([-1 if a == axis else 1 for a in range(array.ndim)])
    return np.asarray(array.take(low, axis) * (1 - part) + array.take(high, axis) * part)
