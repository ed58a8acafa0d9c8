"""Differences of outputs from a reference: numeric, discrete, and of rows of data-dependent number."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from edgepack.ir.arrays import Array

ROWS_AT_A_TIME = 256


class Difference(NamedTuple):
    """Power of a reference and of the error; ``equal``: the share of equal values of a discrete output."""

    signal: float
    noise: float
    equal: float | None = None


def compared_outputs(reference: Mapping[str, Array]) -> tuple[list[str], bool]:
    """Names of the outputs to compare, and whether they are numeric.

    Float outputs if there are any; else outputs of 8 or 16 bits, which are images or quantized values; else
    all outputs, which are discrete (labels, indices): a value is right or wrong.
    """
    for kinds in (np.floating, (np.int8, np.uint8, np.int16, np.uint16)):
        several = kinds if isinstance(kinds, tuple) else (kinds,)
        names = [n for n, a in reference.items() if any(np.issubdtype(a.dtype, kind) for kind in several)]
        if names:
            return names, True
    return list(reference), False


def numeric_difference(expected: Array, got: Array) -> Difference:
    """Squared difference of two arrays of equal shape; elements not finite in ``expected`` do not count."""
    finite = np.isfinite(expected)
    wide = np.where(finite, expected, 0).astype(np.float64)
    off = wide - np.where(finite, got, 0)
    return Difference(float((wide**2).sum()), float((off**2).sum()))


def discrete_difference(expected: Array, got: Array) -> Difference:
    """Unequal elements of two discrete arrays of equal shape; each has a signal of one, an error of one."""
    wrong = int((expected != got).sum())
    return Difference(expected.size, wrong, 1 - wrong / expected.size if expected.size else None)


def open_axis(expected: Array, got: Array) -> int | None:
    """The only axis in which two arrays differ in size; ``None`` where several differ, or the rank."""
    if expected.ndim != got.ndim:
        return None
    axes = [axis for axis in range(expected.ndim) if expected.shape[axis] != got.shape[axis]]
    return axes[0] if len(axes) == 1 else None


def data_dependent_axes(runs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> dict[str, int]:
    """Axis by output whose size differs between runs (feeds and outputs) with inputs of equal shapes."""
    first: dict[tuple[object, ...], Array] = {}
    found: dict[str, int] = {}
    for feeds, outputs in runs:
        fed = tuple(array.shape for array in feeds.values())
        for name, array in outputs.items():
            axis = open_axis(first.setdefault((name, fed), array), array)
            if axis is not None:
                found.setdefault(name, axis)
    return found


def as_rows(array: Array, axis: int) -> Array:
    """``[rows, values]`` along ``axis``."""
    values = array.size // max(array.shape[axis], 1)
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], values)


def numeric_row_difference(expected: Array, got: Array) -> Difference:
    """Squared difference of numeric rows in any order and number: each is compared with the nearest.

    For the boxes of detectors: one box more, or two in another order, would shift all others.
    """
    a, b = (np.where(np.isfinite(x), x, 0).astype(np.float64) for x in (expected, got))
    signal = float((a**2).sum())
    if not a.size or not b.size:
        return Difference(signal, float((a**2).sum() + (b**2).sum()))
    return Difference(signal, max(_to_nearest(a, b), _to_nearest(b, a)))


def _to_nearest(rows: Array, others: Array) -> float:
    """Sum of squared distances from each of ``rows`` to the nearest of ``others``."""
    total, squares = 0.0, (others**2).sum(1)
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        chunk = rows[start : start + ROWS_AT_A_TIME]
        nearest = (squares - 2 * chunk @ others.T).argmin(1)
        total += float(((chunk - others[nearest]) ** 2).sum())
    return total


def discrete_row_difference(expected: Array, got: Array) -> Difference:
    """Difference of discrete rows in any order and number: rows that only one side has are wrong."""
    a, b = (Counter(map(tuple, rows.tolist())) for rows in (expected, got))
    most = max(len(expected), len(got))
    wrong = most - (a & b).total()
    return Difference(most, wrong, 1 - wrong / most if most else None)
