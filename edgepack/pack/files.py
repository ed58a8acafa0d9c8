"""The files of a model, and the tensors in them."""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from edgepack.errors import ModelError
from edgepack.pack.container import squeeze
from edgepack.pack.rans import Bytes
from edgepack.pack.spans import SIGNED, Span
from edgepack.pack.tables import least_bytes
from edgepack.pack.wire import INT32, INT64, RawTensor, raw_tensors

LEAST_BYTES = 32
"""Smaller tensors stay in the text around them: a span itself takes a few bytes."""
BLOCK_BYTES = 1 << 16
"""Block size for files of unknown structure."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the model, memory-mapped."""

    name: str
    """Path relative to the model's folder, with slashes."""
    path: Path
    content: Bytes


@contextmanager
def source_files(model: Path) -> Iterator[tuple[list[SourceFile], list[Span]]]:
    """The files of ``model``, the model file first, and their spans in order.

    An ``.onnx`` is read with its external data, any other file as plain bytes.

    Raises:
        ModelError: a file cannot be read, is no ONNX model, or is outside of the model's folder.
    """
    with ExitStack() as stack:
        own = SourceFile(model.name, model, _mapped(model, stack))
        if model.suffix.lower() != ".onnx":
            yield [own], plain_spans(0, own.content, 0, len(own.content))
            return
        try:
            tensors = list(raw_tensors(own.content.data))
        except ModelError as error:
            raise ModelError(f"{model}: {error}") from error
        if not len(own.content):
            raise ModelError(f"{model}: is empty (0 bytes); export or download it again")
        files = [own]
        for location in dict.fromkeys(t.location for t in tensors if t.location is not None):
            path = model.parent / safe_name(location, model)
            files.append(SourceFile(location, path, _mapped(path, stack)))
        yield files, _spans(files, tensors)


def safe_name(name: str, source: Path) -> PurePosixPath:
    """``name`` as a path inside of the folder of ``source``.

    Raises:
        ModelError: the path leads outside.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name or "\\" in name or ":" in name:
        raise ModelError(f"{source}: names a file {name!r} outside of its folder")
    return path


def _mapped(path: Path, stack: ExitStack) -> Bytes:
    try:
        file = stack.enter_context(path.open("rb"))
        if path.stat().st_size == 0:
            return np.empty(0, np.uint8)
        # Not closed explicitly: arrays may still refer to it; it is freed with the last of them.
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def _spans(files: Sequence[SourceFile], tensors: Sequence[RawTensor]) -> list[Span]:
    """Tensors as spans; other bytes of a data file, which other models may use, become plain spans."""
    index = {file.name: number for number, file in enumerate(files)}
    placed: list[Span] = []
    for tensor in tensors:
        number = 0 if tensor.location is None else index[tensor.location]
        if tensor.location is not None and not tensor.length:
            tensor.length = _stated_bytes(tensor)
        if tensor.offset + tensor.length > len(files[number].content):
            raise ModelError(
                f"{files[number].path}: a tensor ends at byte {tensor.offset + tensor.length}, the file at "
                f"{len(files[number].content)}: it is cut short, copy it again"
            )
        if tensor.length >= LEAST_BYTES:
            size = tensor.item_bytes if tensor.length % tensor.item_bytes == 0 else 1
            flags = SIGNED if tensor.data_type in (INT32, INT64) else 0
            span = Span(
                number, tensor.offset, tensor.length, size, tensor.rows, tensor.data_type, flags=flags
            )
            placed.append(span)
    placed.sort(key=lambda span: (span.file, span.offset, -span.length))
    spans: list[Span] = []
    ends = [0] * len(files)
    for span in placed:
        if span.offset < ends[span.file]:  # several tensors may share bytes of a data file
            continue
        if span.file:
            spans += plain_spans(span.file, files[span.file].content, ends[span.file], span.offset)
        spans.append(span)
        ends[span.file] = span.offset + span.length
    for number, file in enumerate(files[1:], 1):
        spans += plain_spans(number, file.content, ends[number], len(file.content))
    return sorted(spans, key=lambda span: (span.file, span.offset))


def _stated_bytes(tensor: RawTensor) -> int:
    size = tensor.item_bytes
    for dim in tensor.dims:
        size *= dim
    return size


def plain_spans(file: int, raw: Bytes, start: int, stop: int) -> list[Span]:
    """The blocks of ``raw`` that a frequency table codes better than LZMA; adjacent blocks are joined."""
    found: list[Span] = []
    step = max(BLOCK_BYTES, (stop - start) >> 10)
    for at in range(start, stop, step):
        block = raw[at : min(at + step, stop)]
        probe = block[:BLOCK_BYTES]
        if len(probe) < BLOCK_BYTES // 2:
            continue
        counts = np.bincount(probe, minlength=256).astype(np.int64)
        if least_bytes(counts) >= len(squeeze(probe.tobytes(), is_text=True)):
            continue
        if found and found[-1].offset + found[-1].length == at and _alike(found[-1], raw, counts):
            found[-1].length += len(block)
        else:
            found.append(Span(file, at, len(block), 1, 1))
    return found


def _alike(span: Span, raw: Bytes, counts: npt.NDArray[np.int64]) -> bool:
    """Whether one table for both takes no more bytes than two."""
    last = raw[span.offset + span.length - BLOCK_BYTES : span.offset + span.length]
    before = np.bincount(last, minlength=256).astype(np.int64)
    return least_bytes(before + counts) <= least_bytes(before) + least_bytes(counts)
