"""Spans: the parts of files that are tensors, the coding of each, and its symbols.

========  ==============================================================================================
coding    what is coded
========  ==============================================================================================
MATRIX    int8 weights. Every row and every column has a class, its mean magnitude on a logarithmic scale;
          their sum selects one of 48 tables that all matrices of the file share.
OWN       the same with 48 tables of its own: pruned or clustered weights, whose distribution differs.
BYTES     bytes with one table of their own: packed 4-bit pairs, tensors without rows.
WORDS     few multi-byte numbers: first bytes, second bytes ... of all such tensors together.
PLANES    many multi-byte numbers: the same within the tensor, a table for each byte plane.
CODEBOOK  numbers with at most 256 distinct values: the values, and an index for each number.
SPARSE    numbers with many zeros: a bit mask, and the planes of the others.
SCALED    float32 numbers that equal another span times one number, rounded: the scales of a bias, which are
          the weight scales times the input scale.
SAME      the content of an earlier span.
========  ==============================================================================================

A span is coded in pieces, so that no tensor must fit into memory; coder and decoder derive the same pieces.
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


class Coding(IntEnum):
    """How the content of a span is coded; the numbers are part of the file format."""

    MATRIX = 0
    BYTES = 1
    WORDS = 2
    PLANES = 3
    CODEBOOK = 4
    SPARSE = 5
    SAME = 6
    SCALED = 7
    OWN = 8


MATRICES = (Coding.MATRIX, Coding.OWN)
"""Codings whose tables are selected by row and column."""


PIECE = 1 << 20
"""Elements in a piece."""
SHARED_TABLES = 48
"""Tables of all MATRIX spans together, the first in the file; tables of single spans follow."""
MIDDLE_COLUMN = 12
"""The class of a column of mean magnitude."""
MOST_COLUMN = 23
CLASSES_PER_OCTAVE = 3
SIGNED = 1
"""Flag: zigzag-coded, so that small negative numbers have empty upper planes too."""


@dataclass(slots=True)
class Span:
    """A part of a file that holds a tensor."""

    file: int
    offset: int
    length: int
    item_bytes: int
    rows: int
    data_type: int = 0
    """ONNX data type, 0 if unknown; the decoder does not need it."""
    coding: Coding = Coding.WORDS
    flags: int = 0
    first_table: int = 0
    """Number of its first table; meaningless if it has none."""
    same_as: int = 0
    """For SAME and SCALED the number of the other span."""
    factor: Array = field(default_factory=lambda: np.zeros(1, "<f4"))
    """For SCALED."""
    row_class: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))
    column_class: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))
    codebook: Array = field(default_factory=lambda: np.empty(0, np.uint8))
    filled: list[int] = field(default_factory=list)
    """For SPARSE: nonzero numbers in each piece."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.length // self.item_bytes

    @property
    def columns(self) -> int:
        """Bytes in a row of a matrix."""
        return self.length // self.rows

    @property
    def tables(self) -> int:
        """Number of its own tables."""
        own = {
            Coding.OWN: SHARED_TABLES,
            Coding.BYTES: 1,
            Coding.CODEBOOK: 1,
            Coding.PLANES: self.item_bytes,
            Coding.SPARSE: 1 + self.item_bytes,
        }
        return own.get(self.coding, 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``stop`` of a span."""

    span: Span
    number: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.stop - self.start


def pieces(span: Span) -> Iterator[Piece]:
    """The pieces of a span, whole rows for a matrix; none for a span without its own symbols."""
    if span.coding in (Coding.WORDS, Coding.SAME, Coding.SCALED):
        return
    step = PIECE
    if span.coding in MATRICES:
        step = max(PIECE // span.columns, 1) * span.columns
    for number, start in enumerate(range(0, span.elements, step)):
        yield Piece(span, number, start, min(start + step, span.elements))


def contexts(piece: Piece) -> Contexts:
    """For each symbol of a piece the number of its table."""
    span, first = piece.span, piece.span.first_table
    if span.coding in MATRICES:
        rows = span.row_class[piece.start // span.columns : piece.stop // span.columns].astype(np.int16)
        by_column = span.column_class.astype(np.int16) - MIDDLE_COLUMN
        table = np.clip(rows[:, None] + by_column[None, :], 0, SHARED_TABLES - 1)
        return np.asarray(first + table.reshape(-1), np.uint16)
    runs = {
        Coding.BYTES: [piece.count],
        Coding.CODEBOOK: [piece.count],
        Coding.PLANES: [piece.count] * span.item_bytes,
    }
    if span.coding is Coding.SPARSE:
        counts = [-(-piece.count // 8), *[span.filled[piece.number]] * span.item_bytes]
    else:
        counts = runs[span.coding]
    return np.asarray(np.repeat(np.arange(first, first + len(counts)), counts), np.uint16)


def symbols(piece: Piece, content: Bytes) -> Bytes:
    """The symbols of a piece; ``content`` is its whole span."""
    span = piece.span
    if span.coding in (*MATRICES, Coding.BYTES):
        return content[piece.start : piece.stop]
    numbers = words(content, span.item_bytes)[piece.start : piece.stop]
    if span.coding is Coding.CODEBOOK:
        return np.searchsorted(span.codebook, numbers).astype(np.uint8)
    if span.coding is Coding.PLANES:
        return planes(numbers, span.flags)
    there = numbers != 0
    return np.concatenate([np.packbits(there), planes(numbers[there], span.flags)])


def content(piece: Piece, coded: Bytes) -> Bytes:
    """The bytes of a piece from its symbols: the inverse of :func:`symbols`.

    Raises:
        ModelError: the symbols do not fit the span.
    """
    span = piece.span
    if span.coding in (*MATRICES, Coding.BYTES):
        return coded
    if span.coding is Coding.CODEBOOK:
        if coded.size and int(coded.max()) >= len(span.codebook):
            raise ModelError("a codebook lacks a value: the file is damaged; copy it again")
        return span.codebook[coded].view(np.uint8)
    if span.coding is Coding.PLANES:
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
    """All first bytes, all second bytes, and so on, least significant first."""
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
    """float32 products, rounded once as in IEEE 754, so equal on all machines."""
    with np.errstate(all="ignore"):
        return np.asarray(numbers.astype(np.float32) * factor.astype(np.float32), "<f4")
