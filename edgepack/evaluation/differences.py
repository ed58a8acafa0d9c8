"""How far outputs are from a reference: as numbers, as answers, as rows whose number follows from data."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from edgepack.ir.arrays import Array

ROWS_AT_A_TIME = 256


class Difference(NamedTuple):
    """Power of a reference and of what is off; ``equal``: the share of equal answers, if there are such."""

    signal: float
    noise: float
    equal: float | None = None


def compared_outputs(reference: Mapping[str, Array]) -> tuple[list[str], bool]:
    """Names of the outputs that tell how close a model is, and whether they are numbers.

    Floats where there are any; without them small integers, which are pictures or stored reals; without these
    what is left, whose values are answers that are right or wrong.
    """
    for kinds in (np.floating, (np.int8, np.uint8, np.int16, np.uint16)):
        several = kinds if isinstance(kinds, tuple) else (kinds,)
        names = [n for n, a in reference.items() if any(np.issubdtype(a.dtype, kind) for kind in several)]
        if names:
            return names, True
    return list(reference), False


def numbers(expected: Array, got: Array) -> Difference:
    """Of two arrays of one shape; places where ``expected`` is not finite do not count."""
    finite = np.isfinite(expected)
    wide = np.where(finite, expected, 0).astype(np.float64)
    off = wide - np.where(finite, got, 0)
    return Difference(float((wide**2).sum()), float((off**2).sum()))


def answers(expected: Array, got: Array) -> Difference:
    """Of two arrays of one shape whose values are right or wrong; a wrong one counts as all of its signal."""
    wrong = int((expected != got).sum())
    return Difference(expected.size, wrong, 1 - wrong / expected.size if expected.size else None)


def open_axis(expected: Array, got: Array) -> int | None:
    """The one axis in which two arrays differ in size; ``None`` where they differ in more, or in rank."""
    if expected.ndim != got.ndim:
        return None
    axes = [axis for axis in range(expected.ndim) if expected.shape[axis] != got.shape[axis]]
    return axes[0] if len(axes) == 1 else None


def sized_by_data(runs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> dict[str, int]:
    """Outputs whose size differs between runs (feeds and outputs) on equal shapes, and in which axis."""
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


def rows_of_numbers(expected: Array, got: Array) -> Difference:
    """Of rows in any order and number: each is as far off as the nearest of the other side is from it.

    What detectors give: one box more, or two that changed places, shifts all others.
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
        part = rows[start : start + ROWS_AT_A_TIME]
        nearest = (squares - 2 * part @ others.T).argmin(1)
        total += float(((part - others[nearest]) ** 2).sum())
    return total


def rows_of_answers(expected: Array, got: Array) -> Difference:
    """Of rows in any order and number, which the other side has or has not."""
    a, b = (Counter(map(tuple, rows.tolist())) for rows in (expected, got))
    most = max(len(expected), len(got))
    wrong = most - (a & b).total()
    return Difference(most, wrong, 1 - wrong / most if most else None)
