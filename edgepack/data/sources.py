"""Sources of samples, each read one sample at a time: stacked arrays, folders, functions."""

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.lib import format as npy

from edgepack.config.recipe import ImageInput, Labels
from edgepack.config.user_code import load_function
from edgepack.data.feeds import check_names
from edgepack.data.images import EXTENSIONS, check_image_input, read_image
from edgepack.data.labels import Label, as_label, from_filename, from_table
from edgepack.errors import ConfigError, SamplesError
from edgepack.ir.arrays import Array
from edgepack.ir.inputs import InputSpec, has_batch_axis

# Limit for a function that never ends, which would otherwise hang a build silently.
MAX_FUNCTION_SAMPLES = 1_000_000


class Stream(Protocol):
    """Yields the raw feeds of the samples at ``indices`` (ascending), in order; each call starts again."""

    def __call__(self, indices: Sequence[int]) -> Iterator[Mapping[str, Array]]:
        """Start to read."""


@dataclass(frozen=True, slots=True)
class Source:
    """All samples of one source, not yet checked against the model."""

    keys: tuple[str, ...]
    """The name of each sample in error messages."""
    stream: Stream
    labels: tuple[Label, ...] | None = None
    images: tuple[Path, ...] | None = None
    """The image files, for a folder of images: hashing a file is faster than decoding it."""
    preprocessing: str = ""
    """What else the feeds depend on, for the fingerprint."""


def open_stack(path: Path, inputs: Sequence[InputSpec], labels: Labels | None) -> Source:
    """Samples stacked along a leading axis: a .npz with one array per input, or a .npy for the only input.

    Only headers and labels are read here, and later one row per input at a time, so files may be large.

    Raises:
        SamplesError: broken file, missing array, or arrays of different lengths.
        ConfigError: ``labels`` cannot apply to a single file.
    """
    members = [i.name for i in inputs]
    if labels is not None:
        if labels.array is None or path.suffix.lower() == ".npy":
            raise ConfigError(
                f"{path}: the labels of stacked samples can only be an array in a .npz (labels.array)"
            )
        members.append(labels.array)
    with _reading(path), ExitStack() as stack:
        streams = _open_members(path, members, inputs, stack)
        lengths = {name: _length(file, f"{path}: array {name!r}") for name, file in streams.items()}
    first, count = next(iter(lengths.items()))
    for name, length in lengths.items():
        if length != count:
            raise SamplesError(
                f"{path}: array {name!r} has {length} samples but {first!r} has {count}; the leading axis "
                "must count the same samples in all"
            )
    values: tuple[Label, ...] | None = None
    if labels is not None and labels.array is not None:
        with _reading(path), ExitStack() as stack:
            column = _open_members(path, [labels.array], (), stack)[labels.array]
            values = tuple(
                as_label(row, f"{path}: array {labels.array!r}[{i}]")
                for i, row in enumerate(_rows(column, range(count)))
            )
    keys = tuple(f"{path.name}[{i}]" for i in range(count))
    return Source(keys, partial(_stream_stack, path, inputs), values)


def _stream_stack(
    path: Path, inputs: Sequence[InputSpec], indices: Sequence[int]
) -> Iterator[dict[str, Array]]:
    with _reading(path), ExitStack() as stack:
        files = _open_members(path, [i.name for i in inputs], inputs, stack)
        columns = [_rows(files[i.name], indices) for i in inputs]
        for rows in zip(*columns, strict=True):
            # A row lacks the sample axis; if the rank is ambiguous, the leading axis is the batch.
            yield {
                i.name: row[np.newaxis] if i.shape is None else row
                for i, row in zip(inputs, rows, strict=True)
            }


def open_folder(
    path: Path, inputs: Sequence[InputSpec], images: Mapping[str, ImageInput], labels: Labels | None
) -> Source:
    """A folder with one sample per file, sorted by name: .npz, .npy or images, one kind only.

    Subfolders, hidden files and other extensions are ignored. If a file holds more than one row along the
    model's batch axis, the files are stacks: each row is a sample.

    Raises:
        SamplesError: no usable file, several kinds, or a kind that does not fit the model.
        ConfigError: images without preprocessing, or labels that cannot apply.
    """
    kinds = {".npz": ".npz", ".npy": ".npy"} | dict.fromkeys(EXTENSIONS, "image")
    everything = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    files = tuple(p for p in everything if p.suffix.lower() in kinds)
    found = sorted({kinds[p.suffix.lower()] for p in files})
    if not found:
        what = (
            f"{len(everything)} files, none of them"
            if everything
            else "no files (subfolders are not read), none"
        )
        raise SamplesError(f"{path}: has {what} of a known kind: {', '.join(kinds)}")
    if len(found) > 1:
        raise SamplesError(f"{path}: mixes {' and '.join(found)} files; keep one kind in a folder")
    if found[0] != "image" and _are_stacks(files, inputs):
        return _joined([open_stack(file, inputs, labels) for file in files])
    keys = tuple(f"{path.resolve().name}/{p.name}" for p in files)
    values = _folder_labels(path, files, found[0], labels)
    if found[0] == "image":
        spec = _only_image(path, inputs, images)
        read: Callable[[Path], dict[str, Array]] = partial(_read_image_feed, inputs[0], spec)
        stream = partial(_each, files, read)
        return Source(keys, stream, values, files, f"{inputs[0].name}: {spec.model_dump_json()}")
    if found[0] == ".npy":
        _only_input(path, inputs)
    return Source(keys, partial(_each, files, partial(_read_arrays, inputs)), values)


def _are_stacks(files: Sequence[Path], inputs: Sequence[InputSpec]) -> bool:
    """Whether a file holds several samples along the batch axis, and all files have that axis."""
    if not all(has_batch_axis(spec) for spec in inputs):
        return False
    most = 1
    for index, file in enumerate(files):
        with _naming(index), _reading(file), ExitStack() as stack:
            held = _open_members(file, [i.name for i in inputs], inputs, stack)
            shapes = {name: _header(array)[0] for name, array in held.items()}
        if any(i.shape is None or len(shapes[i.name]) != len(i.shape) for i in inputs):
            return False
        most = max(most, *(shape[0] for shape in shapes.values()))
    return most > 1


def _joined(sources: Sequence[Source]) -> Source:
    """The samples of several sources in sequence; all have labels, or none."""
    labels = [label for source in sources for label in source.labels or ()]
    return Source(
        tuple(key for source in sources for key in source.keys),
        partial(_stream_joined, sources),
        tuple(labels) if labels else None,
    )


def _stream_joined(sources: Sequence[Source], indices: Sequence[int]) -> Iterator[Mapping[str, Array]]:
    first = 0
    for source in sources:
        inside = [i - first for i in indices if first <= i < first + len(source.keys)]
        yield from source.stream(inside)
        first += len(source.keys)


def open_function(reference: str, base: Path, labels: Labels | None) -> Source:
    """A Python function without arguments that yields feeds, or ``(feeds, label)``; called at each iteration.

    It is iterated once here, to count its samples and keep their labels.

    Raises:
        ConfigError: it cannot be imported, or ``labels`` are given in addition.
        SamplesError: it raises, or yields another type, nothing, or without end.
    """
    if labels is not None:
        raise ConfigError(f"{reference}: a function yields (feeds, label) itself; remove labels:")
    function = load_function(reference, base)
    values: list[Label] = []
    count = 0
    for index, (_, label) in enumerate(_items(function, reference)):
        count += 1
        if count > MAX_FUNCTION_SAMPLES:
            raise SamplesError(
                f"{reference}: yields more than {MAX_FUNCTION_SAMPLES} samples; does it ever end?"
            )
        if label is not None:
            values.append(label)
        if len(values) not in (0, count):
            raise SamplesError(f"{reference}[{index}]: some samples have a label and some have none")
    if count == 0:
        raise SamplesError(f"{reference}: yields no samples")
    kept = tuple(values) if values else None
    keys = tuple(f"{reference}[{i}]" for i in range(count))
    return Source(keys, partial(_stream_function, function, reference, kept), kept)


def _stream_function(
    function: Callable[..., Any], reference: str, labels: tuple[Label, ...] | None, indices: Sequence[int]
) -> Iterator[Mapping[str, Array]]:
    wanted = iter(indices)
    next_index = next(wanted, None)
    for index, (feeds, label) in enumerate(_items(function, reference)):
        if next_index is None:
            return
        if index != next_index:
            continue
        if labels is not None and label != labels[index]:
            raise SamplesError(
                f"{reference}[{index}]: had the label {labels[index]!r} and now has {label!r}; the function "
                "must yield the same samples at each call: fix its seed"
            )
        yield feeds
        next_index = next(wanted, None)
    if next_index is not None:
        raise SamplesError(
            f"{reference}: ended before sample {next_index}, which an earlier call gave; the function must "
            "yield the same samples at each call, so make a new iterator inside it"
        )


def _items(
    function: Callable[..., Any], reference: str
) -> Iterator[tuple[Mapping[str, Array], Label | None]]:
    index = -1
    try:
        for index, item in enumerate(function()):
            feeds, label = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
            if not isinstance(feeds, Mapping):
                raise SamplesError(
                    f"{reference}[{index}]: yielded {type(item).__name__}; yield {{input name: array}} or "
                    "({input name: array}, label)"
                )
            yield feeds, None if label is None else as_label(label, f"{reference}[{index}]")
    except SamplesError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise SamplesError(
            f"{reference}: raised {type(error).__name__} for sample {index + 1}: {error}"
        ) from error


def _folder_labels(
    path: Path, files: Sequence[Path], kind: str, labels: Labels | None
) -> tuple[Label, ...] | None:
    if labels is None:
        return None
    if labels.filename is not None:
        return from_filename(labels.filename, files)
    if labels.file is not None:
        return from_table(labels.file, files)
    assert labels.array is not None
    if kind != ".npz":
        raise ConfigError(f"{path}: labels.array needs .npz files; use labels.filename or labels.file")
    return tuple(_read_label(file, labels.array, index) for index, file in enumerate(files))


def _read_label(file: Path, name: str, index: int) -> Label:
    with _reading(file), ExitStack() as stack:
        return as_label(_whole(_open_members(file, [name], (), stack)[name]), f"{file}: sample {index}")


def _only_input(path: Path, inputs: Sequence[InputSpec]) -> InputSpec:
    if len(inputs) != 1:
        names = ", ".join(repr(i.name) for i in inputs)
        raise SamplesError(
            f"{path}: feeds one input, but the model has {len(inputs)} ({names}); give .npz files with an "
            "array for each, or a function `module:function`"
        )
    return inputs[0]


def _only_image(path: Path, inputs: Sequence[InputSpec], images: Mapping[str, ImageInput]) -> ImageInput:
    spec = _only_input(path, inputs)
    if spec.name in images:
        check_image_input(f"images.{spec.name}", images[spec.name], spec.dtype)
        return images[spec.name]
    shape = spec.shape if spec.shape is not None and len(spec.shape) == 4 else (None,) * 4
    channels_last = shape[3] in (1, 3) and shape[1] not in (1, 3)
    sizes = zip(("height", "width"), shape[1:3] if channels_last else shape[2:], strict=True)
    keys = [f"{key}: {size if isinstance(size, int) else 'PIXELS'}" for key, size in sizes]
    keys += ["mean: 0", "std: 1" if spec.dtype == np.uint8 else "std: 255"]
    keys += ["color: gray"] if (shape[3] if channels_last else shape[1]) == 1 else []
    keys += ["layout: nhwc"] if channels_last else []
    raise ConfigError(
        f"{path}: holds images, but nothing says how they become the input {spec.name!r}; add to the "
        f"recipe, with the mean and std of the training:\nimages:\n  {spec.name!r}: {{{', '.join(keys)}}}"
    )


def _each(
    files: Sequence[Path], read: Callable[[Path], dict[str, Array]], indices: Sequence[int]
) -> Iterator[dict[str, Array]]:
    for index in indices:
        with _naming(index):
            feeds = read(files[index])
        yield feeds


def _read_image_feed(spec: InputSpec, image: ImageInput, path: Path) -> dict[str, Array]:
    return {spec.name: read_image(path, image, spec.dtype)}


def _read_arrays(inputs: Sequence[InputSpec], path: Path) -> dict[str, Array]:
    with _reading(path), ExitStack() as stack:
        files = _open_members(path, [i.name for i in inputs], inputs, stack)
        return {name: _whole(file) for name, file in files.items()}


def _open_members(
    path: Path, names: Sequence[str], inputs: Sequence[InputSpec], stack: ExitStack
) -> dict[str, IO[bytes]]:
    """Open the arrays ``names`` of a .npz; a .npy is the one array of the only input."""
    if path.suffix.lower() == ".npy":
        return {_only_input(path, inputs).name: stack.enter_context(path.open("rb"))}
    archive = stack.enter_context(zipfile.ZipFile(path))
    held = {name.removesuffix(".npy") for name in archive.namelist()}
    check_names(held, inputs, str(path))
    for name in names:
        if name not in held:
            raise SamplesError(
                f"{path}: has no array {name!r} (labels.array); it has {', '.join(sorted(held))}"
            )
    return {name: stack.enter_context(archive.open(f"{name}.npy")) for name in names}


@contextmanager
def _naming(index: int) -> Iterator[None]:
    try:
        yield
    except SamplesError as error:
        raise SamplesError(f"sample {index}: {error}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SamplesError(
            f"{path}: is broken or not a {path.suffix} file ({error}); write it again"
        ) from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype of the array in ``file``; leaves the file at the data."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f".npy version {version} is not known")
    shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(
        file
    )
    if dtype.hasobject:
        raise ValueError("it holds Python objects, and unpickling them could run any code")
    return shape, fortran, dtype


def _length(file: IO[bytes], where: str) -> int:
    shape, _, _ = _header(file)
    if not shape or shape[0] == 0:
        raise SamplesError(
            f"{where} has shape {list(shape)}; a leading axis with at least one sample is needed"
        )
    return shape[0]


def _rows(file: IO[bytes], indices: Sequence[int]) -> Iterator[Array]:
    """The rows of an array in .npy format, one in memory at a time (all of them if in Fortran order)."""
    shape, fortran, dtype = _header(file)
    if fortran and len(shape) > 1:
        whole = np.frombuffer(file.read(), dtype).reshape(shape[::-1]).T
        yield from (whole[i] for i in indices)
        return
    start, size_bytes = file.tell(), dtype.itemsize * math.prod(shape[1:])
    for index in indices:
        file.seek(start + index * size_bytes)
        content = file.read(size_bytes)
        if len(content) < size_bytes:
            raise EOFError(f"the data end in sample {index} of {shape[0]}")
        yield np.frombuffer(content, dtype).reshape(shape[1:])
    file.read(1)  # at the end of an archive's member, this verifies its checksum


def _whole(file: IO[bytes]) -> Array:
    array: Array = npy.read_array(file, allow_pickle=False)
    file.read(1)  # as above
    return array
