"""Spans: the parts of files that are tensors, the form that each is coded in, and its symbols.

========  ==============================================================================================
form      what is coded
========  ==============================================================================================
MATRIX    int8 weights. Every row and every column has a class, its mean magnitude on a logarithmic scale;
          their sum selects one of 48 tables that all matrices of the file share.
OWN       the same with 48 tables of its own: pruned or clustered weights, whose values are unlike others.
BYTES     bytes with a table of their own: 4-bit pairs, what has no rows.
WORDS     a few numbers of several bytes: first bytes, second bytes ... of all such tensors together.
PLANES    many of them: the same within the tensor, a table for each plane.
CODEBOOK  numbers with at most 256 different values: the values, and for each number which.
SPARSE    numbers with many zeros: a bit for each, and the planes of the others.
SCALED    float32 numbers that are those of another span times one number, rounded: the scales of a bias,
          which are the weight's times the input's.
SAME      the content of an earlier span.
========  ==============================================================================================

A span is coded in pieces, so that no tensor need be in memory; coder and decoder find the same pieces.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import ModelError
from edgepack.pack.rans import Bytes, Contexts

Array = npt.NDArray[Any]


class Form(IntEnum):
    """How the content of a span is coded; numbers are part of the file format."""

    MATRIX = 0
    BYTES = 1
    WORDS = 2
    PLANES = 3
    CODEBOOK = 4
    SPARSE = 5
    SAME = 6
    SCALED = 7
    OWN = 8


MATRICES = (Form.MATRIX, Form.OWN)
"""Whose tables are selected by row and column."""


PIECE = 1 << 20
"""Elements coded at a time."""
SHARED_TABLES = 48
"""Of all matrices together, the first of all tables; those of single spans follow."""
MIDDLE_COLUMN = 12
"""The class of a column of mean magnitude."""
MOST_COLUMN = 23
CLASSES_PER_OCTAVE = 3
SIGNED = 1
"""Flag: stored after zigzag, so that small negative numbers have empty upper planes too."""


@dataclass(slots=True)
class Span:
    """A part of a file."""

    file: int
    offset: int
    length: int
    item_bytes: int
    rows: int
    data_type: int = 0
    """Of ONNX, 0 where unknown; the decoder need not know it."""
    form: Form = Form.WORDS
    flags: int = 0
    first_table: int = 0
    """Its tables are this one and the next; of no meaning where it has none."""
    same_as: int = 0
    """Of SAME and SCALED the number of the other span."""
    factor: Array = field(default_factory=lambda: np.zeros(1, "<f4"))
    """Of SCALED."""
    row_class: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))
    column_class: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))
    codebook: Array = field(default_factory=lambda: np.empty(0, np.uint8))
    filled: list[int] = field(default_factory=list)
    """Of SPARSE, for each piece, the numbers that are not zero."""

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return self.length // self.item_bytes

    @property
    def columns(self) -> int:
        """Bytes of a row of a matrix."""
        return self.length // self.rows

    @property
    def tables(self) -> int:
        """How many tables of its own it has."""
        own = {
            Form.OWN: SHARED_TABLES,
            Form.BYTES: 1,
            Form.CODEBOOK: 1,
            Form.PLANES: self.item_bytes,
            Form.SPARSE: 1 + self.item_bytes,
        }
        return own.get(self.form, 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``stop`` of a span."""

    span: Span
    number: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Elements in it."""
        return self.stop - self.start


def pieces(span: Span) -> Iterator[Piece]:
    """The pieces of a span, whole rows of a matrix; none for a span that has no symbols of its own."""
    if span.form in (Form.WORDS, Form.SAME, Form.SCALED):
        return
    step = PIECE
    if span.form in MATRICES:
        step = max(PIECE // span.columns, 1) * span.columns
    for number, start in enumerate(range(0, span.elements, step)):
        yield Piece(span, number, start, min(start + step, span.elements))


def contexts(piece: Piece) -> Contexts:
    """For each symbol of a piece the table that codes it."""
    span, first = piece.span, piece.span.first_table
    if span.form in MATRICES:
        rows = span.row_class[piece.start // span.columns : piece.stop // span.columns].astype(np.int16)
        by_column = span.column_class.astype(np.int16) - MIDDLE_COLUMN
        table = np.clip(rows[:, None] + by_column[None, :], 0, SHARED_TABLES - 1)
        return np.asarray(first + table.reshape(-1), np.uint16)
    runs = {
        Form.BYTES: [piece.count],
        Form.CODEBOOK: [piece.count],
        Form.PLANES: [piece.count] * span.item_bytes,
    }
    if span.form is Form.SPARSE:
        counts = [-(-piece.count // 8), *[span.filled[piece.number]] * span.item_bytes]
    else:
        counts = runs[span.form]
    return np.asarray(np.repeat(np.arange(first, first + len(counts)), counts), np.uint16)


def symbols(piece: Piece, content: Bytes) -> Bytes:
    """The symbols of a piece; ``content`` is all of its span."""
    span = piece.span
    if span.form in (*MATRICES, Form.BYTES):
        return content[piece.start : piece.stop]
    numbers = words(content, span.item_bytes)[piece.start : piece.stop]
    if span.form is Form.CODEBOOK:
        return np.searchsorted(span.codebook, numbers).astype(np.uint8)
    if span.form is Form.PLANES:
        return planes(numbers, span.flags)
    there = numbers != 0
    return np.concatenate([np.packbits(there), planes(numbers[there], span.flags)])


def content(piece: Piece, coded: Bytes) -> Bytes:
    """The bytes of a piece from its symbols: the inverse of :func:`symbols`.

    Raises:
        ModelError: the symbols do not fit the span.
    """
    span = piece.span
    if span.form in (*MATRICES, Form.BYTES):
        return coded
    if span.form is Form.CODEBOOK:
        if coded.size and int(coded.max()) >= len(span.codebook):
            raise ModelError("a codebook lacks a value: the file is damaged; copy it again")
        return span.codebook[coded].view(np.uint8)
    if span.form is Form.PLANES:
        return joined(coded, span.item_bytes, span.flags)
    mask_bytes = -(-piece.count // 8)
    there = np.unpackbits(coded[:mask_bytes], count=piece.count).astype(bool)
    numbers = np.zeros(piece.count, f"<u{span.item_bytes}")
    if int(there.sum()) != span.filled[piece.number]:
        raise ModelError("a mask of zeros does not fit its numbers: the file is damaged; copy it again")
    numbers[there] = words(joined(coded[mask_bytes:], span.item_bytes, span.flags), span.item_bytes)
    return numbers.view(np.uint8)


def words(raw: Bytes, item_bytes: int) -> Array:
    """Bytes as unsigned little-endian numbers."""
    return np.ascontiguousarray(raw).view(f"<u{item_bytes}")


def planes(numbers: Array, flags: int = 0) -> Bytes:
    """All first bytes, all second bytes, and so on, lowest first."""
    size = numbers.dtype.itemsize
    if flags & SIGNED:
        signed = numbers.view(f"<i{size}")
        numbers = ((signed << 1) ^ (signed >> (8 * size - 1))).view(f"<u{size}")
    return np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, size).T).reshape(-1)


def joined(separate: Bytes, item_bytes: int, flags: int = 0) -> Bytes:
    """The inverse of :func:`planes`."""
    together = np.ascontiguousarray(separate.reshape(item_bytes, -1).T).reshape(-1)
    if flags & SIGNED:
        folded = words(together, item_bytes)
        one = folded.dtype.type(1)
        together = ((folded >> one) ^ (~(folded & one) + one)).view(np.uint8)
    return together


def scaled(numbers: Array, factor: Array) -> Array:
    """float32 products, rounded once, as IEEE 754 has it everywhere."""
    with np.errstate(all="ignore"):
        return np.asarray(numbers.astype(np.float32) * factor.astype(np.float32), "<f4")
