"""Samples for calibration, training and evaluation, read lazily: one sample in memory at a time."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgepack.config.recipe import Data, ImageInput
from edgepack.config.user_code import is_reference
from edgepack.data.feeds import conform, plain
from edgepack.data.images import EXTENSIONS
from edgepack.data.labels import Label
from edgepack.data.sources import Source, open_folder, open_function, open_stack
from edgepack.errors import ConfigError, SamplesError, did_you_mean
from edgepack.ir.arrays import Feeds
from edgepack.ir.inputs import InputSpec

__all__ = ["Feeds", "InputSpec", "Label", "Sample", "Samples", "check_disjoint", "open_samples"]

_SHOWN_PAIRS = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of the model: checked arrays by input name, batch axis included."""

    key: str
    """Name in error messages: ``folder/0042.jpg`` or ``calib.npz[17]``."""
    feeds: Feeds
    label: Label | None


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples in a fixed order; each iteration reads them again, and raises SamplesError for a bad one."""

    source: str
    """The path, or ``module:function``."""
    split: str
    """The split's purpose in messages: calibration, training or evaluation."""
    inputs: tuple[InputSpec, ...]
    origin: Source
    indices: tuple[int, ...]
    """Indices of the samples of ``origin`` that are used."""

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Sample]:
        labels = self.origin.labels
        for index, raw in zip(self.indices, self.origin.stream(self.indices), strict=True):
            key = self.origin.keys[index]
            feeds = conform(raw, self.inputs, f"{self.split} data, sample {index} ({key})")
            yield Sample(key, feeds, None if labels is None else labels[index])

    @property
    def labels(self) -> list[Label] | None:
        """One label per sample, or None without labels."""
        labels = self.origin.labels
        return None if labels is None else [labels[i] for i in self.indices]

    def spread(self, count: int) -> "Samples":
        """At most ``count`` of the samples, evenly spread."""
        count = min(count, len(self))
        return replace(self, indices=tuple(self.indices[i * len(self) // count] for i in range(count)))

    def halves(self) -> tuple["Samples", "Samples"]:
        """The samples with even indices, and those with odd ones; a single sample is in both."""
        halves = (self.indices[::2], self.indices[1::2] or self.indices)
        first, second = (replace(self, indices=half) for half in halves)
        return first, second

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all feeds in order, or of image files and preprocessing. Reads all samples."""
        total = hashlib.sha256(self.origin.preprocessing.encode())
        for _, digest in _digests(self, by_file=self.origin.images is not None):
            total.update(digest)
        return total.hexdigest()


def open_samples(
    data: Data, split: str, inputs: Sequence[InputSpec], images: Mapping[str, ImageInput], *, base: Path
) -> Samples:
    """The samples that ``data`` names, for a model with ``inputs``.

    Sources: a ``.npz`` with an array per input, stacked along a leading axis (arrays of other names are
    ignored); a stacked ``.npy``, a folder of ``.npy`` or a folder of images for a model with one input; a
    folder of ``.npz`` with one sample each, or of stacks; ``module:function`` with ``base`` on ``sys.path``.
    The batch axis of a sample is optional. ``images`` holds the preprocessing by input name. ``data.samples``
    limits the number of samples; they are spread evenly over all.

    The structure and the first sample are checked here, the other samples when they are read.

    Raises:
        SamplesError: the data are missing, broken, or do not fit the model.
        ConfigError: the recipe lacks a key (``images:``) or has an impossible value.
    """
    for name in images:
        if name not in {i.name for i in inputs}:
            hint = did_you_mean(name, [i.name for i in inputs])
            raise ConfigError(f"images.{name}: the model has no such input, {hint}")
    origin = _open(data, inputs, images, base)
    total = len(origin.keys)
    count = total if data.samples is None else min(data.samples, total)
    indices = tuple(i * total // count for i in range(count))
    samples = Samples(data.path, split, tuple(inputs), origin, indices)
    next(iter(samples))
    return samples


def _open(data: Data, inputs: Sequence[InputSpec], images: Mapping[str, ImageInput], base: Path) -> Source:
    if is_reference(data.path):
        return open_function(data.path, base, data.labels)
    path = Path(data.path)
    if path.is_dir():
        return open_folder(path, inputs, images, data.labels)
    if not path.exists():
        raise SamplesError(
            f"{path}: does not exist (looked at {path.absolute()}); correct the path of the data"
        )
    if path.suffix.lower() in (".npz", ".npy"):
        return open_stack(path, inputs, data.labels)
    if path.suffix.lower() in EXTENSIONS:
        raise SamplesError(f"{path}: is one image; name the folder that holds all of them")
    raise SamplesError(
        f"{path}: is not sample data; give a folder of images, .npz or .npy files, one .npz or .npy, or "
        "`module:function`"
    )


def check_disjoint(used: Samples, evaluation: Samples) -> None:
    """Refuse evaluation samples that are also ``used`` for calibration or training: their scores are biased.

    Compares SHA-256 of the feeds, or of the files if both splits are image folders.

    Raises:
        SamplesError: the message has the number of shared samples, and the first few by key.
    """
    by_file = used.origin.images is not None and evaluation.origin.images is not None
    seen = {digest: key for key, digest in _digests(used, by_file)}
    shared = [(seen[digest], key) for key, digest in _digests(evaluation, by_file) if digest in seen]
    if not shared:
        return
    pairs = ", ".join(f"{a} = {b}" for a, b in shared[:_SHOWN_PAIRS])
    more = f" and {len(shared) - _SHOWN_PAIRS} more" if len(shared) > _SHOWN_PAIRS else ""
    raise SamplesError(
        f"{len(shared)} evaluation samples are also {used.split} samples ({pairs}{more}; from "
        f"{evaluation.source} and {used.source}); remove them from one of the two"
    )


def _digests(samples: Samples, by_file: bool) -> Iterator[tuple[str, bytes]]:
    """Key and SHA-256 of each sample, or of each row of a batch, so that equal rows in batches are found."""
    files = samples.origin.images
    if by_file and files is not None:
        for index in samples.indices:
            try:
                with files[index].open("rb") as file:
                    whole = hashlib.file_digest(file, "sha256")
            except OSError as error:
                raise SamplesError(f"{files[index]}: sample {index} cannot be read: {error}") from error
            yield samples.origin.keys[index], whole.digest()
        return
    batched = all(i.shape and not isinstance(i.shape[0], int) for i in samples.inputs)
    for sample in samples:
        for row in _rows(sample.feeds) if batched else (sample.feeds,):
            digest = hashlib.sha256()
            for name, array in row.items():
                digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
                # Text is an object array, whose bytes are addresses.
                digest.update(plain(array).tobytes())
            yield sample.key, digest.digest()


def _rows(feeds: Feeds) -> Iterator[Feeds]:
    """The samples of a batch, one by one; feeds whose first axes differ are one sample."""
    sizes = {array.shape[0] for array in feeds.values()}
    if len(sizes) != 1:
        yield feeds
        return
    for i in range(sizes.pop()):
        yield {name: array[i : i + 1] for name, array in feeds.items()}
