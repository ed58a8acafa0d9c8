"""Which coding each span gets: the one with the fewest bytes, computed from counts."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from edgepack.pack.rans import Bytes
from edgepack.pack.spans import (
    CLASSES_PER_OCTAVE,
    MIDDLE_COLUMN,
    MOST_COLUMN,
    PIECE,
    SHARED_TABLES,
    Coding,
    Span,
    contexts,
    pieces,
    scaled,
    symbols,
    words,
)
from edgepack.pack.tables import code_bytes, fit, least_bytes
from edgepack.pack.wire import FLOAT, INT8

Counts = npt.NDArray[np.int64]
Read = Callable[[Span], Bytes]
"""Reads the content of a span, memory-mapped."""

FEW_BYTES = 1 << 15
"""Multi-byte numbers in spans smaller than this are coded together with similar ones."""
MOST_TABLES = 60_000
"""Of a file; further spans are coded as words. A table takes 16 kB of memory while it is used."""
CODEBOOK_BYTES = 512
"""Smaller tensors get neither classes nor a codebook: these would not pay off."""
NEIGHBOURS = 64
"""Largest distance, in spans, between a span and a multiple of it."""
SPARSE_SHARE = 1 / 16
"""Share of zeros from which a bit mask is smaller than zeros in the planes."""
CLASS_BITS = 2.5
"""Approximate bits of a class, once coded."""


def choose_codings(spans: Sequence[Span], read: Read) -> Counts:
    """Set the coding and the tables of every span; returns symbol counts ``[tables, 256]``."""
    seen: dict[tuple[int, bytes], int] = {}
    shared = np.zeros((SHARED_TABLES, 256), np.int64)
    matrices: list[tuple[Span, Counts]] = []
    for number, span in enumerate(spans):
        raw = read(span)
        first = seen.setdefault((span.length, _digest(raw)), number)
        if first != number:
            span.coding, span.same_as = Coding.SAME, first
        elif span.item_bytes > 1:
            _choose_words(span, raw)
            _choose_scaled(number, spans, read)
        elif span.data_type == INT8 and span.length >= CODEBOOK_BYTES and span.columns <= PIECE:
            span.coding = Coding.MATRIX
            span.row_class, span.column_class = _classes(span, raw)
            counts = _counts(span, raw, SHARED_TABLES)
            shared += counts
            matrices.append((span, counts))
        else:
            span.coding = Coding.BYTES if span.length >= FEW_BYTES else Coding.WORDS
    tables, _stored = fit(shared)
    for span, counts in matrices:
        used = counts.sum(axis=1) > 0
        together = sum(code_bytes(c, t) for c, t in zip(counts[used], tables[used], strict=True))
        classes = (len(span.row_class) + len(span.column_class)) * CLASS_BITS / 8
        costs = {
            Coding.MATRIX: together + classes,
            Coding.OWN: sum(map(least_bytes, counts[used])) + classes,
            Coding.BYTES: least_bytes(counts.sum(axis=0)),
        }
        span.coding = min(costs, key=lambda coding: costs[coding])
    return _all_counts(spans, read)


def _all_counts(spans: Sequence[Span], read: Read) -> Counts:
    """Number the tables and count the symbols that each codes."""
    total = SHARED_TABLES
    for span in spans:
        if total + span.tables > MOST_TABLES:
            span.coding = Coding.WORDS
        span.first_table = 0 if span.coding is Coding.MATRIX else total
        total += span.tables
    counts = np.zeros((total, 256), np.int64)
    for span in spans:
        first, size = span.first_table, SHARED_TABLES if span.coding is Coding.MATRIX else span.tables
        if size:
            counts[first : first + size] += _counts(span, read(span), size)
    return counts


def _counts(span: Span, raw: Bytes, tables: int) -> Counts:
    total = np.zeros(tables * 256, np.int64)
    for piece in pieces(span):
        place = (contexts(piece).astype(np.int32) - span.first_table) * 256 + symbols(piece, raw)
        total += np.bincount(place, minlength=total.size)
    return total.reshape(tables, 256)


def _choose_words(span: Span, raw: Bytes) -> None:
    """Choose a codebook, a mask of zeros or planes; WORDS for a small span."""
    numbers = words(raw, span.item_bytes)
    if span.length >= CODEBOOK_BYTES and (values := _few_values(numbers)) is not None:
        span.coding, span.codebook = Coding.CODEBOOK, values
    elif span.length < FEW_BYTES:
        span.coding = Coding.WORDS
    else:
        filled = [int(np.count_nonzero(numbers[a : a + PIECE])) for a in range(0, len(numbers), PIECE)]
        sparse = sum(filled) <= (1 - SPARSE_SHARE) * len(numbers)
        span.coding, span.filled = (Coding.SPARSE, filled) if sparse else (Coding.PLANES, [])


def _choose_scaled(number: int, spans: Sequence[Span], read: Read) -> None:
    """Code this span, or an earlier one, as a multiple of the other, if it is one bit for bit."""
    this = spans[number]
    if this.data_type != FLOAT or this.coding is not Coding.WORDS:
        return
    like = [
        (at, span)
        for at, span in enumerate(spans[max(number - NEIGHBOURS, 0) : number], max(number - NEIGHBOURS, 0))
        if span.data_type == FLOAT and span.coding is Coding.WORDS and span.length == this.length
    ]
    for at, span in reversed(like):
        for copy, base, place in ((this, span, at), (span, this, number)):
            if (factor := _factor(words(read(copy), 4), words(read(base), 4))) is not None:
                copy.coding, copy.same_as, copy.factor = Coding.SCALED, place, factor
                if copy is this:
                    return
                break


def _factor(copy: npt.NDArray[np.uint32], base: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32] | None:
    """The float32 factor that gives ``copy`` from ``base``, if there is one near their ratio."""
    top = int(np.argmax(np.abs(base.view(np.float32))))
    with np.errstate(all="ignore"):
        guess = copy[top : top + 1].view(np.float32) / base[top : top + 1].view(np.float32)
    if not np.isfinite(guess).all() or not guess.all():
        return None
    near = (guess.view(np.int32) + np.arange(-2, 3, dtype=np.int32)).view(np.float32)
    for factor in near:
        one = np.array([factor], "<f4")
        for part in (slice(0, 8), slice(0, None)):  # most mismatches are in the first few
            if not np.array_equal(scaled(base[part].view(np.float32), one).view(np.uint32), copy[part]):
                break
        else:
            return one
    return None


def _few_values(numbers: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger] | None:
    """The distinct values, if they are at most 256 and a codebook pays off."""
    most = min(256, len(numbers) // 4)
    values = np.unique(numbers[:4096])
    for start in range(0, len(numbers), PIECE):
        if len(values) > most:
            return None
        values = np.union1d(values, numbers[start : start + PIECE])
    return values if len(values) <= most else None


def _classes(span: Span, raw: Bytes) -> tuple[Bytes, Bytes]:
    """Classes of rows, and of columns relative to all, by mean magnitude."""
    matrix = raw.view(np.int8).reshape(span.rows, span.columns)
    by_row, by_column = np.empty(span.rows), np.zeros(span.columns)
    step = max(PIECE // span.columns, 1)
    for start in range(0, span.rows, step):
        size = np.abs(matrix[start : start + step].astype(np.int16))
        by_row[start : start + step] = size.mean(axis=1)
        by_column += size.sum(axis=0)
    by_column /= max(by_row.sum(), 1e-9)
    rows = np.clip(_level(by_row) + MIDDLE_COLUMN, 0, SHARED_TABLES - 1)
    columns = np.clip(_level(by_column) + MIDDLE_COLUMN, 0, MOST_COLUMN)
    if span.rows == 1:
        columns = np.full(span.columns, MIDDLE_COLUMN)
    return rows.astype(np.uint8), columns.astype(np.uint8)


def _level(size: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    return np.asarray(np.rint(CLASSES_PER_OCTAVE * np.log2(np.maximum(size, 2.0**-8))), np.int64)


def _digest(raw: Bytes) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(raw).data).digest()
