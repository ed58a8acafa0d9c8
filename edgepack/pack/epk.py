"""``.epk``: a model packed into one file, and unpacked byte for byte.

A model's files are cut into spans (its tensors) and the text between them. The text is coded by LZMA; each
tensor gets the coding that takes the fewest bytes (:mod:`edgepack.pack.spans`).
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgepack.errors import ExportError, ModelError
from edgepack.pack.choose import choose_codings
from edgepack.pack.container import Kind, expand, read_chunks, squeeze, write_chunk, write_start
from edgepack.pack.files import SourceFile, safe_name, source_files
from edgepack.pack.layout import (
    COPIES,
    SPAN_BYTES,
    blocks,
    gaps,
    notes,
    span_bytes,
    spans_of,
    table_count,
    take_notes,
    word_groups,
)
from edgepack.pack.rans import Bytes, Coder, decode, encode
from edgepack.pack.spans import Coding, Span, content, contexts, joined, planes, scaled, symbols, words
from edgepack.pack.tables import fit, restore

SUFFIX = ".epk"
TEXT_PIECE = 1 << 24
"""Bytes of text in one chunk."""
COPY_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Packed:
    """The result of packing."""

    path: Path
    raw_bytes: int
    packed_bytes: int
    files: tuple[str, ...]
    """Names of the model's files."""


def pack(model: Path, output: Path, *, check: bool = True) -> Packed:
    """Write ``model``, packed, to ``output``, and ``check`` that unpacking restores the same bytes.

    ``model`` is an ``.onnx``, packed with its external data, or any other single file.

    Raises:
        ModelError: the model cannot be read.
        ExportError: the file cannot be written, or unpacking gives other bytes.
    """
    output = Path(output).absolute()
    with source_files(Path(model).absolute()) as (files, spans):
        if output.resolve() in {file.path.resolve() for file in files}:
            raise ExportError(f"{output}: is a file of the model itself; name another with -o")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".pack-", dir=output.parent) as folder:
                draft = Path(folder) / output.name
                with draft.open("wb") as file:
                    _write(file, files, spans)
                if check:
                    (Path(folder) / "check").mkdir()
                    _restore(draft, Path(folder) / "check")
                draft.replace(output)
        except OSError as error:
            raise ExportError(f"{output}: cannot be written: {error.strerror}") from error
        total = sum(len(file.content) for file in files)
        return Packed(output, total, output.stat().st_size, tuple(file.name for file in files))


def unpack(packed: Path, output: Path | None = None) -> tuple[Path, ...]:
    """Restore the files of a packed model; returns their paths, the model file first.

    Args:
        packed: the ``.epk``.
        output: the path of the model file, or a folder for it; by default the original name beside
            ``packed``. External data are written beside the model under the names that it refers to.

    Raises:
        ModelError: ``packed`` is no ``.epk``, has a newer version, is truncated, or damaged.
        ExportError: a file cannot be written; no partial file remains then.
    """
    packed = Path(packed).absolute()
    target = packed.parent if output is None else Path(output).absolute()
    folder = target if target.is_dir() else target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as scratch:
            names = _restore(packed, Path(scratch))
            places = [folder / name for name in names]
            if not target.is_dir():
                places[0] = target
            if packed.resolve() in {place.resolve() for place in places} or len(set(places)) < len(places):
                raise ExportError(
                    f"{target}: would overwrite another file of this model; name another with -o"
                )
            for name, place in reversed(list(zip(names, places, strict=True))):  # the model file last
                place.parent.mkdir(parents=True, exist_ok=True)
                (Path(scratch) / name).replace(place)
    except OSError as error:
        raise ExportError(f"{target}: cannot be written: {error.strerror}") from error
    return tuple(places)


def _write(file: BinaryIO, files: Sequence[SourceFile], spans: Sequence[Span]) -> None:
    def read(span: Span) -> Bytes:
        return files[span.file].content[span.offset : span.offset + span.length]

    tables, stored = fit(choose_codings(spans, read))
    known = b"".join(notes(span) for span in spans)
    sizes = [len(f.content) for f in files]
    header = {
        "files": [{"name": f.name, "bytes": len(f.content), "sha256": _sha256(f.content)} for f in files],
        "spans": len(spans),
        "notes": len(known),
        "tables": len(stored),
    }
    write_start(file)
    write_chunk(file, Kind.HEADER, json.dumps(header, separators=(",", ":"), sort_keys=True).encode())
    write_chunk(file, Kind.SPANS, squeeze(span_bytes(spans)))
    write_chunk(file, Kind.NOTES, squeeze(known))
    write_chunk(file, Kind.TABLES, squeeze(stored))
    for parts in gaps(sizes, spans, TEXT_PIECE):
        text = b"".join(files[number].content[start:stop].tobytes() for number, start, stop in parts)
        write_chunk(file, Kind.TEXT, squeeze(text, is_text=True))
    for group in word_groups(spans):
        numbers = words(np.concatenate([read(span) for span in group]), group[0].item_bytes)
        write_chunk(file, Kind.WORDS, squeeze(planes(numbers, group[0].flags).tobytes()))
    coder = Coder.of(tables)
    for block in blocks(spans):
        coded = np.concatenate([symbols(piece, read(piece.span)) for piece in block])
        context = np.concatenate([contexts(piece) for piece in block])
        write_chunk(file, Kind.SYMBOLS, encode(coded, context, coder))
    write_chunk(file, Kind.END, b"")


def _restore(packed: Path, folder: Path) -> list[str]:
    """Write the files of ``packed`` into ``folder``; returns their names. Refuses a damaged file."""
    try:
        source = packed.open("rb")
    except OSError as error:
        raise ModelError(f"{packed}: cannot be read: {error.strerror}") from error
    with source, ExitStack() as stack:
        chunks = read_chunks(source, packed)
        try:
            header = json.loads(_next(chunks, Kind.HEADER))
            entries = [(str(e["name"]), int(e["bytes"]), str(e["sha256"])) for e in header["files"]]
            counts = [int(header[key]) for key in ("spans", "notes", "tables")]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{packed}: its header is damaged; copy it again") from error
        files = []
        for name, size, _ in entries:
            path = folder / safe_name(name, packed)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.append(stack.enter_context(path.open("w+b")))
            files[-1].truncate(size)
        try:
            _fill(chunks, [size for _, size, _ in entries], counts, files)
        except ModelError as error:
            raise error if str(packed) in str(error) else ModelError(f"{packed}: {error}") from error
        for file, (name, _, digest) in zip(files, entries, strict=True):
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ModelError(f"{packed}: {name} does not come out as it went in; copy the file again")
    return [name for name, _, _ in entries]


def _fill(
    chunks: Iterator[tuple[Kind, bytes]],
    sizes: Sequence[int],
    counts: Sequence[int],
    files: Sequence[BinaryIO],
) -> None:
    """Decode everything after the header into ``files``."""
    span_count, notes_bytes, tables_bytes = counts
    spans = spans_of(expand(_next(chunks, Kind.SPANS), SPAN_BYTES * span_count), sizes)
    known = memoryview(expand(_next(chunks, Kind.NOTES), notes_bytes))
    for span in spans:
        known = take_notes(span, known)
    tables = restore(expand(_next(chunks, Kind.TABLES), tables_bytes), table_count(spans))

    def write(number: int, offset: int, raw: bytes | memoryview) -> None:
        files[number].seek(offset)
        files[number].write(raw)

    for parts in gaps(sizes, spans, TEXT_PIECE):
        size = sum(stop - start for _, start, stop in parts)
        text = memoryview(expand(_next(chunks, Kind.TEXT), size, is_text=True))
        for number, start, stop in parts:
            write(number, start, text[: stop - start])
            text = text[stop - start :]
    for group in word_groups(spans):
        size = sum(span.length for span in group)
        numbers = np.frombuffer(expand(_next(chunks, Kind.WORDS), size), np.uint8)
        raw = joined(numbers, group[0].item_bytes, group[0].flags)
        for span in group:
            write(span.file, span.offset, raw[: span.length].data)
            raw = raw[span.length :]
    coder = Coder.of(tables)
    for block in blocks(spans):
        context = [contexts(piece) for piece in block]
        coded = decode(_next(chunks, Kind.SYMBOLS), np.concatenate(context), coder)
        for piece, its in zip(block, context, strict=True):
            at = piece.span.offset + piece.start * piece.span.item_bytes
            write(piece.span.file, at, np.ascontiguousarray(content(piece, coded[: len(its)])).data)
            coded = coded[len(its) :]
    _next(chunks, Kind.END)
    next(chunks, None)  # nothing may follow
    _copy(spans, files)


def _copy(spans: Sequence[Span], files: Sequence[BinaryIO]) -> None:
    """Fill the spans that are copies of others: in order, those that are only scaled first."""
    for span in sorted((s for s in spans if s.coding in COPIES), key=lambda s: s.coding is Coding.SAME):
        first = spans[span.same_as]
        for done in range(0, span.length, COPY_BYTES):
            files[first.file].seek(first.offset + done)
            raw = files[first.file].read(min(COPY_BYTES, span.length - done))
            if span.coding is Coding.SCALED:
                raw = scaled(np.frombuffer(raw, "<f4"), span.factor).tobytes()
            files[span.file].seek(span.offset + done)
            files[span.file].write(raw)


def _next(chunks: Iterator[tuple[Kind, bytes]], wanted: Kind) -> bytes:
    kind, raw = next(chunks)
    if kind is not wanted:
        raise ModelError(
            f"has a chunk {kind.name} where {wanted.name} should be: it is damaged; copy it again"
        )
    return raw


def _sha256(raw: Bytes) -> str:
    return hashlib.sha256(raw.data).hexdigest()
