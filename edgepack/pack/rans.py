"""An entropy coder for bytes: range asymmetric numeral systems (rANS; Duda 2013), in vectorized NumPy.

Each byte is coded with one of many frequency tables; its number, the context, is known to coder and decoder.
Symbols are distributed over lanes in turn, so that one step of all lanes is a few array operations; the lanes
share one stream of 16-bit words (interleaving after Giesen 2014). All arithmetic is in integers, so any
machine reads what another has written.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgepack.errors import ModelError

Bytes = npt.NDArray[np.uint8]
Tables = npt.NDArray[np.uint16]
"""``[tables, 256]``: frequencies of the bytes; each row sums to :data:`TOTAL`."""
Contexts = npt.NDArray[np.uint16]
"""For each symbol the row of its table."""

BITS = 14
TOTAL = 1 << BITS
WORD = 16
LEAST_STATE = 1 << WORD
SYMBOLS_PER_LANE = 4096
"""Symbols of a lane: a lane costs two bytes, 0.05% of these."""
MOST_LANES = 512
"""Most lanes; twice as many are no faster."""


@dataclass(frozen=True, slots=True, eq=False)
class Coder:
    """Frequency tables with derived lookup arrays."""

    frequency: npt.NDArray[np.uint32]
    """``[tables × 256]``."""
    start: npt.NDArray[np.uint32]
    """``[tables × 256]``: cumulative frequencies within the table."""
    symbol: Bytes
    """``[tables × TOTAL]``: the byte of each slot."""

    @staticmethod
    def of(tables: Tables) -> "Coder":
        """The coder of these tables.

        Raises:
            ModelError: a table does not sum to :data:`TOTAL`.
        """
        frequency = tables.astype(np.uint32)
        if not np.all(frequency.sum(axis=1) == TOTAL):
            raise ModelError("a table of frequencies does not sum up: the file is damaged; copy it again")
        start = np.cumsum(frequency, axis=1, dtype=np.uint32) - frequency
        every = np.tile(np.arange(256, dtype=np.uint8), len(tables))
        symbol = np.repeat(every, frequency.reshape(-1))
        return Coder(frequency.reshape(-1), start.reshape(-1), symbol)


def normalize(counts: npt.NDArray[np.int64]) -> Tables:
    """Frequencies that sum to :data:`TOTAL` in each row; every byte that occurs gets at least one.

    ``counts``: ``[tables, 256]``, no row all zero.
    """
    present = counts > 0
    room = TOTAL - present.sum(axis=1, keepdims=True)
    scaled = counts * room // counts.sum(axis=1, keepdims=True) + present
    rows = np.arange(len(scaled))
    scaled[rows, scaled.argmax(axis=1)] += TOTAL - scaled.sum(axis=1)
    return np.asarray(scaled, np.uint16)


def _lanes(count: int) -> int:
    return min(max(count // SYMBOLS_PER_LANE, 1), MOST_LANES)


def encode(symbols: Bytes, contexts: Contexts, coder: Coder) -> bytes:
    """The code of ``symbols``: final states of the lanes, then the words in the order of decoding.

    Every symbol must have a frequency in the table of its context.
    """
    count, lanes = len(symbols), _lanes(len(symbols))
    place = contexts.astype(np.uint32) * 256 + symbols
    frequency, start = coder.frequency[place], coder.start[place]
    if count and not frequency.all():
        raise ValueError("a symbol without a frequency in its table")
    state = np.full(lanes, LEAST_STATE, np.uint32)
    words: list[npt.NDArray[np.uint16]] = []
    first = (count - 1) // lanes * lanes if count else -1
    for at in range(first, -1, -lanes):  # from last to first: rANS decodes in reverse order
        f, s = frequency[at : at + lanes], start[at : at + lanes]
        x = state[: len(f)]
        full = (x >> (2 * WORD - BITS)) >= f
        if full.any():
            words.append(x[full].astype(np.uint16))
            x = np.where(full, x >> WORD, x)
        quotient = x // f
        state[: len(f)] = (quotient << BITS) + (x - quotient * f) + s
    words.reverse()
    stream = np.concatenate(words) if words else np.empty(0, np.uint16)
    return state.astype("<u4").tobytes() + stream.astype("<u2").tobytes()


def decode(code: bytes, contexts: Contexts, coder: Coder) -> Bytes:
    """The symbols that :func:`encode` coded with the same contexts and tables.

    Raises:
        ModelError: the code does not hold exactly these symbols.
    """
    count, lanes = len(contexts), _lanes(len(contexts))
    if len(code) < 4 * lanes or len(code) % 2:
        raise ModelError("a block of symbols is cut short: the file is damaged; copy it again")
    state = np.frombuffer(code, "<u4", lanes).astype(np.uint32)
    words = np.frombuffer(code, "<u2", offset=4 * lanes).astype(np.uint32)
    symbols = np.empty(count, np.uint8)
    table = contexts.astype(np.uint32)
    used = 0
    for at in range(0, count, lanes):
        c = table[at : at + lanes]
        x = state[: len(c)]
        slot = x & (TOTAL - 1)
        s = coder.symbol[(c << BITS) + slot]
        place = (c << 8) + s
        x = coder.frequency[place] * (x >> BITS) + slot - coder.start[place]
        empty = np.flatnonzero(x < LEAST_STATE)
        if empty.size:
            fresh = words[used : used + empty.size]
            if fresh.size < empty.size:
                raise ModelError("a block of symbols ends early: the file is damaged; copy it again")
            x[empty] = (x[empty] << WORD) | fresh
            used += empty.size
        symbols[at : at + lanes] = s
        state[: len(c)] = x
    if used != words.size or not np.all(state == LEAST_STATE):
        raise ModelError(
            "a block of symbols does not end where it should: the file is damaged; copy it again"
        )
    return symbols
