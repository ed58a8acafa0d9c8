"""Which form each span is coded in: the one that takes the fewest bytes, by count."""

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
    Form,
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
"""The content of a span, mapped."""

FEW_BYTES = 1 << 15
"""Numbers of several bytes in less than this are coded together with others like them."""
MOST_TABLES = 60_000
"""Of a file; spans beyond are coded as words. A table takes 16 kB while it is used."""
CODEBOOK_BYTES = 512
"""Smaller tensors are coded as they are: neither classes nor a codebook would pay."""
NEIGHBOURS = 64
"""Spans that the one whose multiple another is may be away."""
SPARSE_SHARE = 1 / 16
"""Share of zeros from which a mask is smaller than the zeros among the planes."""
CLASS_BITS = 2.5
"""What a class takes, about, once coded."""


def choose_forms(spans: Sequence[Span], read: Read) -> Counts:
    """Give every span its form and its tables; returns the counts ``[tables, 256]`` to make those from."""
    seen: dict[tuple[int, bytes], int] = {}
    shared = np.zeros((SHARED_TABLES, 256), np.int64)
    matrices: list[tuple[Span, Counts]] = []
    for number, span in enumerate(spans):
        raw = read(span)
        first = seen.setdefault((span.length, _digest(raw)), number)
        if first != number:
            span.form, span.same_as = Form.SAME, first
        elif span.item_bytes > 1:
            _choose_words(span, raw)
            _choose_scaled(number, spans, read)
        elif span.data_type == INT8 and span.length >= CODEBOOK_BYTES and span.columns <= PIECE:
            span.form = Form.MATRIX
            span.row_class, span.column_class = _classes(span, raw)
            counts = _counts(span, raw, SHARED_TABLES)
            shared += counts
            matrices.append((span, counts))
        else:
            span.form = Form.BYTES if span.length >= FEW_BYTES else Form.WORDS
    tables, _stored = fit(shared)
    for span, counts in matrices:
        used = counts.sum(axis=1) > 0
        together = sum(code_bytes(c, t) for c, t in zip(counts[used], tables[used], strict=True))
        classes = (len(span.row_class) + len(span.column_class)) * CLASS_BITS / 8
        costs = {
            Form.MATRIX: together + classes,
            Form.OWN: sum(map(least_bytes, counts[used])) + classes,
            Form.BYTES: least_bytes(counts.sum(axis=0)),
        }
        span.form = min(costs, key=lambda form: costs[form])
    return _all_counts(spans, read)


def _all_counts(spans: Sequence[Span], read: Read) -> Counts:
    """Number the tables and count what each codes."""
    total = SHARED_TABLES
    for span in spans:
        if total + span.tables > MOST_TABLES:
            span.form = Form.WORDS
        span.first_table = 0 if span.form is Form.MATRIX else total
        total += span.tables
    counts = np.zeros((total, 256), np.int64)
    for span in spans:
        first, size = span.first_table, SHARED_TABLES if span.form is Form.MATRIX else span.tables
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
    """A codebook, a mask of zeros, planes; or among the few where it is small."""
    numbers = words(raw, span.item_bytes)
    if span.length >= CODEBOOK_BYTES and (values := _few_values(numbers)) is not None:
        span.form, span.codebook = Form.CODEBOOK, values
    elif span.length < FEW_BYTES:
        span.form = Form.WORDS
    else:
        filled = [int(np.count_nonzero(numbers[a : a + PIECE])) for a in range(0, len(numbers), PIECE)]
        sparse = sum(filled) <= (1 - SPARSE_SHARE) * len(numbers)
        span.form, span.filled = (Form.SPARSE, filled) if sparse else (Form.PLANES, [])


def _choose_scaled(number: int, spans: Sequence[Span], read: Read) -> None:
    """Make this span, or an earlier one, a multiple of the other, where it is one to the last bit."""
    this = spans[number]
    if this.data_type != FLOAT or this.form is not Form.WORDS:
        return
    like = [
        (at, span)
        for at, span in enumerate(spans[max(number - NEIGHBOURS, 0) : number], max(number - NEIGHBOURS, 0))
        if span.data_type == FLOAT and span.form is Form.WORDS and span.length == this.length
    ]
    for at, span in reversed(like):
        for copy, base, place in ((this, span, at), (span, this, number)):
            if (factor := _factor(words(read(copy), 4), words(read(base), 4))) is not None:
                copy.form, copy.same_as, copy.factor = Form.SCALED, place, factor
                if copy is this:
                    return
                break


def _factor(copy: npt.NDArray[np.uint32], base: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32] | None:
    """The float32 number that makes ``copy`` of ``base``, if there is one near their ratio."""
    top = int(np.argmax(np.abs(base.view(np.float32))))
    with np.errstate(all="ignore"):
        guess = copy[top : top + 1].view(np.float32) / base[top : top + 1].view(np.float32)
    if not np.isfinite(guess).all() or not guess.all():
        return None
    near = (guess.view(np.int32) + np.arange(-2, 3, dtype=np.int32)).view(np.float32)
    for factor in near:
        one = np.array([factor], "<f4")
        for part in (slice(0, 8), slice(0, None)):  # most differ in the first few
            if not np.array_equal(scaled(base[part].view(np.float32), one).view(np.uint32), copy[part]):
                break
        else:
            return one
    return None


def _few_values(numbers: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger] | None:
    """The different values, where they are at most 256 and a code is worth it."""
    most = min(256, len(numbers) // 4)
    values = np.unique(numbers[:4096])
    for start in range(0, len(numbers), PIECE):
        if len(values) > most:
            return None
        values = np.union1d(values, numbers[start : start + PIECE])
    return values if len(values) <= most else None


def _classes(span: Span, raw: Bytes) -> tuple[Bytes, Bytes]:
    """Classes of the rows, and of the columns against all, by mean magnitude."""
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
