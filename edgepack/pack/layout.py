"""Shared by coder and decoder: the table of spans, their side information, and the grouping of pieces."""

from collections.abc import Iterator, Sequence

import numpy as np

from edgepack.errors import ModelError
from edgepack.pack.rans import Bytes
from edgepack.pack.spans import MATRICES, PIECE, SHARED_TABLES, SIGNED, Coding, Piece, Span, pieces

WORDS_PIECE = 1 << 22
"""Approximate bytes of small tensors that are coded together."""
BLOCK = 1 << 20
"""Pieces are coded together until they have this many symbols."""
COPIES = (Coding.SAME, Coding.SCALED)
DAMAGED = "the table of tensors is damaged; copy the file again"
_FIELDS = ("file", "gap", "length", "item_bytes", "rows", "coding", "flags", "back")
SPAN_BYTES = 8 * len(_FIELDS)


def span_bytes(spans: Sequence[Span]) -> bytes:
    """The table of spans, eight bytes a field, stored by field and byte plane; offsets as gaps."""
    rows = []
    file = end = 0
    for number, span in enumerate(spans):
        if span.file != file:
            file, end = span.file, 0
        back = number - span.same_as if span.coding in COPIES else 0
        gap, end = span.offset - end, span.offset + span.length
        rows.append([span.file, gap, span.length, span.item_bytes, span.rows, span.coding, span.flags, back])
    table = np.array(rows, "<i8").reshape(-1, len(_FIELDS))
    return np.ascontiguousarray(table.T).view(np.uint8).reshape(-1, 8).T.tobytes()


def spans_of(stored: bytes, sizes: Sequence[int]) -> list[Span]:
    """The spans that :func:`span_bytes` stored; ``sizes`` are the bytes of the files.

    Raises:
        ModelError: they are outside of the files, or inconsistent.
    """
    table = np.frombuffer(stored, np.uint8).reshape(8, -1).T
    rows = np.ascontiguousarray(table).view("<i8").reshape(len(_FIELDS), -1).T.tolist()
    spans: list[Span] = []
    file = end = 0
    tables = SHARED_TABLES
    for number, (of, gap, length, item_bytes, size, coding, flags, back) in enumerate(rows):
        if of != file:
            file, end = of, 0
        ok = 0 <= of < len(sizes) and gap >= 0 < length and end + gap + length <= sizes[of]
        ok &= item_bytes in (1, 2, 4, 8) and size > 0 and flags in (0, SIGNED) and coding in list(Coding)
        if not ok or length % item_bytes or length % size:
            raise ModelError(DAMAGED)
        span = Span(of, end + gap, length, item_bytes, size, coding=Coding(coding), flags=flags)
        span.same_as = number - back
        if span.coding is not Coding.MATRIX:
            span.first_table = tables
        tables += span.tables
        spans.append(span)
        end += gap + length
    for number, span in enumerate(spans):
        if span.coding in COPIES and not _is_copy(number, span, spans):
            raise ModelError(DAMAGED)
    return spans


def _is_copy(number: int, span: Span, spans: Sequence[Span]) -> bool:
    """Whether it may be a copy of the span that it names, which must not be a copy of a later span."""
    if not 0 <= span.same_as < len(spans) or spans[span.same_as].length != span.length:
        return False
    if span.coding is Coding.SAME:
        return span.same_as < number
    return span.item_bytes == 4 and spans[span.same_as].coding not in COPIES


def table_count(spans: Sequence[Span]) -> int:
    """Number of tables of all spans."""
    return SHARED_TABLES + sum(span.tables for span in spans)


def notes(span: Span) -> bytes:
    """The side information that the decoder needs before a span's symbols."""
    if span.coding in MATRICES:
        return span.row_class.tobytes() + span.column_class.tobytes()
    if span.coding is Coding.CODEBOOK:
        return bytes([len(span.codebook) - 1]) + span.codebook.tobytes()
    if span.coding is Coding.SPARSE:
        return np.array(span.filled, "<u4").tobytes()
    if span.coding is Coding.SCALED:
        return span.factor.tobytes()
    return b""


def take_notes(span: Span, stored: memoryview) -> memoryview:
    """Set the side information of a span; returns the bytes after it.

    Raises:
        ModelError: too few bytes.
    """
    sizes = []
    if span.coding in MATRICES:
        sizes = [span.rows, span.columns]
    elif span.coding is Coding.CODEBOOK:
        sizes = [1, (stored[0] + 1) * span.item_bytes if len(stored) else 0]
    elif span.coding is Coding.SPARSE:
        sizes = [4 * -(-span.elements // PIECE)]
    elif span.coding is Coding.SCALED:
        sizes = [4]
    if sum(sizes) > len(stored):
        raise ModelError(DAMAGED)
    parts: list[Bytes] = []
    for size in sizes:
        parts.append(np.frombuffer(stored[:size], np.uint8))
        stored = stored[size:]
    if span.coding in MATRICES:
        span.row_class, span.column_class = parts
    elif span.coding is Coding.CODEBOOK:
        span.codebook = np.frombuffer(parts[1], f"<u{span.item_bytes}")
    elif span.coding is Coding.SPARSE:
        span.filled = np.frombuffer(parts[0], "<u4").tolist()
        if any(count > piece.count for count, piece in zip(span.filled, pieces(span), strict=True)):
            raise ModelError(DAMAGED)
    elif span.coding is Coding.SCALED:
        span.factor = np.frombuffer(parts[0], "<f4")
    return stored


def gaps(sizes: Sequence[int], spans: Sequence[Span], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """The bytes outside of spans, as ``(file, start, stop)``, in groups of at most ``most`` bytes."""
    group: list[tuple[int, int, int]] = []
    room = most
    for file, start, stop in _uncovered(sizes, spans):
        while start < stop:
            end = min(stop, start + room)
            group.append((file, start, end))
            room -= end - start
            start = end  # noqa: PLW2901
            if not room:
                yield group
                group, room = [], most
    if group:
        yield group


def _uncovered(sizes: Sequence[int], spans: Sequence[Span]) -> Iterator[tuple[int, int, int]]:
    for file, size in enumerate(sizes):
        at = 0
        for span in (s for s in spans if s.file == file):
            yield file, at, span.offset
            at = span.offset + span.length
        yield file, at, size


def word_groups(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Spans of coding WORDS that are coded together: of one element size and sign, in order."""
    keys = sorted({(s.item_bytes, s.flags) for s in spans if s.coding is Coding.WORDS})
    for key in keys:
        group: list[Span] = []
        for span in (s for s in spans if s.coding is Coding.WORDS and (s.item_bytes, s.flags) == key):
            group.append(span)
            if sum(s.length for s in group) >= WORDS_PIECE:
                yield group
                group = []
        if group:
            yield group


def blocks(spans: Sequence[Span]) -> Iterator[list[Piece]]:
    """The pieces that are coded together."""
    block: list[Piece] = []
    total = 0
    for span in spans:
        for piece in pieces(span):
            block.append(piece)
            total += piece.count
            if total >= BLOCK:
                yield block
                block, total = [], 0
    if block:
        yield block
