"""Codebooks: the integers of a clustered weight and their assignment. Works on arrays, without ONNX."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgepack.ir.numerics import MIN_SCALE, short_scale
from edgepack.quantization.weights.gptq import Matrix, output_error, store_gptq

LIMIT = 127
"""Largest magnitude of a code; codes are int8."""
CELLS = 2 * LIMIT + 1
ROUNDS = 2
"""Rounds of fitting the scales and choosing the codes again; a third changes nothing."""

Codes = npt.NDArray[np.int64]


class Coded(NamedTuple):
    """Weights as ``codes * scale``: [groups, outputs, K] and [groups, outputs, 1]."""

    codes: Matrix
    scale: Matrix


def cluster(weight: Matrix, second: Matrix | None, values: int, outputs: int | None) -> Coded:
    """Approximate ``weight`` [groups, outputs, K] by few distinct integers and a scale for each output.

    The weights of each output are divided by its scale. One codebook of ``values`` integers then serves the
    whole layer, or each ``outputs`` consecutive outputs; :func:`best_codes` chooses it. Weights take the
    nearest code or, with the ``second`` moments of the inputs [groups, K, K], the code of GPTQ (see
    :mod:`edgepack.quantization.weights.gptq`). Then the scales are refitted by least squares, in eight bits.
    Zeros stay zeros.
    """
    scale = short_scale(_full_scale(weight))
    if second is None:
        books = codebooks(weight / scale, np.broadcast_to(scale**2, weight.shape), values, outputs)
        columns = [nearest_code(column, books) for column in (weight / scale).transpose(2, 0, 1)]
        return Coded(np.where(weight == 0, 0, np.stack(columns, axis=-1)), scale)
    importance = np.einsum("gkk->gk", second)[:, None]
    best = Coded(np.zeros_like(weight), scale)
    least = np.inf
    for _ in range(ROUNDS + 1):
        books = codebooks(weight / scale, importance * scale**2, values, outputs)
        codes = store_gptq(weight, second, scale, lambda x: nearest_code(x, books))  # noqa: B023
        error = float(output_error(weight, codes * scale, second).sum())
        if not error < least:
            break
        best, least = Coded(codes, scale), error
        scale = short_scale(fitted_scale(weight, codes, second, scale))
    return best


def _full_scale(weight: Matrix) -> Matrix:
    """The scale that maps the largest weight of each output to the largest code; the median scale for outputs
    of zeros."""
    largest = np.abs(weight).max(axis=2, keepdims=True)
    usual = np.median(largest[largest > 0]) if largest.any() else 1.0
    return np.asarray(np.maximum(np.where(largest > 0, largest, usual) / LIMIT, MIN_SCALE), np.float32)


def codebooks(scaled: Matrix, importance: Matrix, values: int, outputs: int | None) -> list[Codes]:
    """A codebook for every ``outputs`` outputs of ``scaled`` [groups, outputs, K], or one for all."""
    rows = scaled.reshape(-1, scaled.shape[2])
    weights = np.broadcast_to(importance, scaled.shape).reshape(rows.shape)
    step = outputs or len(rows)
    return [
        best_codes(rows[start : start + step], weights[start : start + step], values)
        for start in range(0, len(rows), step)
    ]


def best_codes(scaled: Matrix, importance: Matrix, values: int) -> Codes:
    """At most ``values`` integers, sorted, including zero if ``scaled`` has zeros.

    Optimal weighted k-means in one dimension by dynamic programming over the 255 int8 values (Wang and Song,
    2011): minimizes the sum of ``importance`` times the squared distance to the nearest code.
    """
    pruned = scaled == 0
    cell = np.clip(np.rint(scaled), -LIMIT, LIMIT).astype(np.intp) + LIMIT
    weight = np.where(pruned, 0, importance).astype(np.float64)
    x = scaled.astype(np.float64)
    sums = [np.bincount(cell.ravel(), (weight * x**p).ravel(), CELLS) for p in (0, 1, 2)]
    zero, one, two = (np.concatenate([[0.0], np.cumsum(s)]) for s in sums)
    used = zero[:, None] - zero[None]  # [end, start]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(used > 0, (one[:, None] - one[None]) / used, 0)
    centre = np.clip(np.rint(mean), -LIMIT, LIMIT)
    cost = (two[:, None] - two[None]) - 2 * centre * (one[:, None] - one[None]) + centre**2 * used
    cost[np.triu_indices(CELLS + 1, 1)] = np.inf
    chosen = _split(cost, values - int(pruned.any()))
    found = {int(centre[end, start]) for start, end in chosen if used[end, start] > 0}
    return np.array(sorted(found | ({0} if pruned.any() or not found else set())), np.int64)


def _split(cost: npt.NDArray[np.float64], parts: int) -> Sequence[tuple[int, int]]:
    """Intervals (start, end) of least total ``cost`` [end, start], at most ``parts`` of them."""
    best, cuts = cost[:, 0].copy(), []
    for _ in range(parts - 1):
        total = cost + best[None]
        cut = total.argmin(axis=1)
        best = np.take_along_axis(total, cut[:, None], axis=1)[:, 0]
        cuts.append(cut)
    found, end = [], len(cost) - 1
    for cut in reversed(cuts):
        found.append((int(cut[end]), end))
        end = int(cut[end])
    return [*found, (0, end)]


def nearest_code(x: Matrix, books: Sequence[Codes]) -> Matrix:
    """The nearest code for each of ``x`` [groups, outputs]; outputs share the codebooks in their order."""
    flat = x.reshape(-1)
    step = -(-flat.size // len(books))
    parts = [
        book[np.searchsorted((book[1:] + book[:-1]) / 2, flat[i * step : (i + 1) * step])]
        for i, book in enumerate(books)
    ]
    return np.concatenate(parts).astype(np.float32).reshape(x.shape)


def fitted_scale(weight: Matrix, codes: Matrix, second: Matrix, scale: Matrix) -> Matrix:
    """The least-squares scale of each output for its ``codes``; the old one if all are zero."""
    seen = np.matmul(codes, second)
    energy = (seen * codes).sum(axis=2, keepdims=True)
    fitted = (seen * weight).sum(axis=2, keepdims=True) / np.maximum(energy, np.float32(1e-30))
    return np.where((energy > 0) & (fitted > 0.5 * scale) & (fitted < 2 * scale), fitted, scale)
