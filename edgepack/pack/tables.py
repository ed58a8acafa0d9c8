"""Stored frequency tables: a smooth curve of 18 bytes, or every frequency.

The distribution of a trained layer's int8 weights is smooth and nearly symmetric. Eighteen points of its
logarithm by magnitude describe it, with linear interpolation; small models would otherwise spend more bytes
on tables than the tables save. Other distributions (a codebook, a bit mask) are stored in full.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from edgepack.errors import ModelError
from edgepack.pack.rans import BITS, TOTAL, Tables, normalize

Counts = npt.NDArray[np.int64]

KNOTS = np.array([0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48, 64, 85, 107, 126, 127])
"""Magnitudes at which the curve is stored; 0 and 127, the largest of a channel, have their own points."""
STEPS_PER_OCTAVE = 16
TOP = 15 * STEPS_PER_OCTAVE
# 2^(i/16) in 1/65536, written out: a library's power function may round differently elsewhere.
_POWERS = np.array(
    [65536, 68438, 71468, 74632, 77936, 81386, 84990, 88752,
     92682, 96785, 101070, 105545, 110218, 115098, 120194, 125515], np.int64,
)  # fmt: skip
_FULL_BYTES = 1.4
"""Approximate bytes of a frequency in a full table, once coded."""


def fit(counts: Counts) -> tuple[Tables, bytes]:
    """The tables to code with, and their stored bytes; ``counts`` is ``[tables, 256]``.

    Each is a curve or full, whichever takes fewer bytes together with the symbols.
    """
    tables = np.empty(counts.shape, np.uint16)
    kinds, points, full = [], [], []
    for row, count in enumerate(counts):
        used = count if count.any() else np.ones(256, np.int64)
        curve = _points(used)
        smooth, exact = _curve(curve), normalize(used[None])[0]
        spared = code_bytes(used, smooth) + len(KNOTS) - code_bytes(used, exact)
        is_full = spared > _FULL_BYTES * np.count_nonzero(used)
        kinds.append(is_full)
        if is_full:
            full.append(exact)
        else:
            points.append(curve)
        tables[row] = exact if is_full else smooth
    planes = np.array(full, "<u2").reshape(-1).view(np.uint8).reshape(-1, 2).T
    curves = np.array(points, np.uint8).reshape(-1, len(KNOTS)).T
    return tables, np.array(kinds, np.uint8).tobytes() + curves.tobytes() + planes.tobytes()


def restore(stored: bytes, count: int) -> Tables:
    """The tables that :func:`fit` stored.

    Raises:
        ModelError: these bytes do not hold ``count`` tables.
    """
    kinds = np.frombuffer(stored, np.uint8, min(count, len(stored))).astype(bool)
    full, smooth = int(kinds.sum()), int((~kinds).sum())
    if len(stored) != count + smooth * len(KNOTS) + full * 512:
        raise ModelError("the tables of frequencies are damaged; copy the file again")
    curves = np.frombuffer(stored, np.uint8, smooth * len(KNOTS), count).reshape(len(KNOTS), smooth).T
    planes = np.frombuffer(stored, np.uint8, full * 512, count + smooth * len(KNOTS)).reshape(2, -1).T
    tables = np.empty((count, 256), np.uint16)
    tables[~kinds] = [_curve(points) for points in curves] or np.empty((0, 256), np.uint16)
    tables[kinds] = np.ascontiguousarray(planes).view("<u2").reshape(full, 256)
    return tables


def code_bytes(counts: Counts, table: npt.NDArray[np.uint16]) -> float:
    """Bytes of symbols with these counts, coded with ``table``; infinite if it lacks one of them."""
    used = counts > 0
    if not table[used].all():
        return float("inf")
    bits = BITS - np.log2(table[used].astype(np.float64))
    return float(counts[used] @ bits) / 8


def least_bytes(counts: Counts) -> float:
    """Bytes of symbols with these counts and a table of their own, the table included."""
    return code_bytes(counts, normalize(counts[None])[0]) + _FULL_BYTES * np.count_nonzero(counts)


def _points(counts: Counts) -> npt.NDArray[np.uint8]:
    """The curve at the knots, from the mean count around each, over both signs."""
    by_magnitude = np.zeros(129)
    np.add.at(by_magnitude, np.abs(np.arange(256, dtype=np.uint8).view(np.int8).astype(int)), counts)
    by_magnitude[1:] /= 2
    middle = (KNOTS[:-1] + KNOTS[1:]) / 2
    edges = np.concatenate([[0], np.floor(middle).astype(int) + 1, [128]])
    mean = np.array([by_magnitude[a:b].mean() for a, b in pairwise(edges)])
    level = np.log2(np.maximum(mean, mean.max() * 2.0**-14 + 1e-12) / mean.max())
    return np.asarray(np.clip(np.rint(TOP + STEPS_PER_OCTAVE * level), 0, TOP), np.uint8)


def _curve(points: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """Frequencies from the points, all at least one; in integers, so equal on all machines."""
    magnitude = np.minimum(np.abs(np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int64)), 127)
    right = np.searchsorted(KNOTS, magnitude)
    left = np.maximum(right - 1, 0)
    a, b = points[left].astype(np.int64), points[right].astype(np.int64)
    width = np.maximum(KNOTS[right] - KNOTS[left], 1)
    level = b - (b - a) * (KNOTS[right] - magnitude) // width
    weight = (_POWERS[level % STEPS_PER_OCTAVE] << (level // STEPS_PER_OCTAVE)) >> 8
    table: npt.NDArray[np.uint16] = normalize(np.maximum(weight, 1)[None])[0]
    assert int(table.sum()) == TOTAL
    return table
