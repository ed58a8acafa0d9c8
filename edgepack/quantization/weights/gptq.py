"""Second-order rounding: each weight is rounded so that later ones make up for its error."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
"""Single precision: damping keeps the factors far from its limits, and it takes half the time."""

DAMPING = 0.01
"""Of the mean diagonal, added to the moments: few samples leave directions that were never seen."""
BLOCK = 64
"""Columns whose errors are spread within the block first, then to all others by one product."""
DOUBT = 0.1
"""Positions looked at count against this many per input in what two inputs have in common."""
SMALL = 64
"""Triangles up to this size are inverted as they are."""


def round_gptq(weight: Matrix, second: Matrix, scale: Matrix, limit: int | Matrix) -> Matrix:
    """Integers in ``[-limit, limit]`` for ``weight`` that keep ``weight @ x``, given ``E[x xᵀ]``.

    Frantar et al. (2023), GPTQ, after Hassibi and Stork (1993): columns are rounded one by one, and what is
    lost is spread over the columns still open through the inverse second moments. ``weight`` is
    [groups, outputs, K], ``second`` [groups, K, K], ``scale`` [groups, outputs, 1], ``limit`` one number or
    [groups, outputs]. An output keeps plain
    rounding where that is better by the same measure, so the result is never worse than rounding to nearest.
    """
    most = np.broadcast_to(np.asarray(limit, np.float32), scale.shape[:2])
    return store_gptq(weight, second, scale, lambda x: np.clip(np.rint(x), -most, most))


def store_gptq(weight: Matrix, second: Matrix, scale: Matrix, store: Callable[[Matrix], Matrix]) -> Matrix:
    """The same for any set of stored values: ``store`` gives those nearest to a column [groups, outputs].

    Weights that are zero stay zero.
    """
    columns = (weight / scale).transpose(2, 0, 1)
    nearest = np.where(weight == 0, 0, np.stack([store(column) for column in columns], axis=-1))
    # Columns with much input first, while most others are open to make up for them.
    order = np.argsort(-np.einsum("gii->gi", second), axis=1, kind="stable")
    columns = np.take_along_axis(weight.transpose(0, 2, 1), order[:, :, None], axis=1)
    rounded = _round_columns(columns, _spread(second, order), scale[:, :, 0], store)
    inverse = np.argsort(order, axis=1)
    integers = np.take_along_axis(rounded, inverse[:, :, None], axis=1).transpose(0, 2, 1)
    better = output_error(weight, integers * scale, second) < output_error(weight, nearest * scale, second)
    return np.where(better[:, :, None], integers, nearest)


def trusted(second: Matrix, count: int) -> Matrix:
    """Second moments [groups, K, K] of ``count`` inputs, with products of different inputs brought nearer to
    zero the fewer inputs there were: in 32 samples of 1,280 inputs most of what they share is chance.

    A shrinkage estimate, after Ledoit and Wolf (2004).
    """
    columns = second.shape[1]
    kept = count / (count + DOUBT * columns)
    shrunk = second * np.float32(kept)
    np.einsum("gii->gi", shrunk)[:] = np.einsum("gii->gi", second)
    return shrunk


def output_error(weight: Matrix, other: Matrix, second: Matrix) -> Matrix:
    """Mean squared difference of the outputs, per group and output: ``d E[x xᵀ] dᵀ``."""
    difference = other - weight
    return np.asarray((np.matmul(difference, second) * difference).sum(-1))


def _round_columns(
    columns: Matrix, spread: Matrix, scale: Matrix, store: Callable[[Matrix], Matrix]
) -> Matrix:
    """Stored values for ``columns`` [groups, K, outputs] in the order they stand; ``columns`` is used up."""
    integers = np.empty_like(columns)
    pruned = columns == 0
    total = columns.shape[1]
    for start in range(0, total, BLOCK):
        stop = min(start + BLOCK, total)
        errors = np.zeros((len(columns), stop - start, columns.shape[2]), np.float32)
        for i in range(start, stop):
            column = columns[:, i]
            if i > start:
                column -= np.matmul(spread[:, None, start:i, i], errors[:, : i - start])[:, 0]
            integers[:, i] = np.where(pruned[:, i], 0, store(column / scale))
            errors[:, i - start] = (column - integers[:, i] * scale) / spread[:, i, i, None]
        columns[:, stop:] -= np.matmul(spread[:, start:stop, stop:].transpose(0, 2, 1), errors)
    return integers


def inverse_factor(second: Matrix) -> Matrix:
    """``U`` [groups, K, K], upper triangular, with ``UᵀU`` the inverse of the damped moments ``second``."""
    return _spread(second, np.broadcast_to(np.arange(second.shape[1]), second.shape[:2]))


def _spread(second: Matrix, order: npt.NDArray[np.intp]) -> Matrix:
    """``U``, upper triangular, with ``UᵀU`` the inverse of the damped moments, columns in ``order``.

    With ``J`` the reversal and ``J H J = L Lᵀ``, ``U`` is the inverse of ``J L J``: one Cholesky factor and
    one inverse of a triangle, where inverting H first would take three times the work and lose digits.
    """
    backwards = order[:, ::-1]
    damped = np.take_along_axis(second, backwards[:, :, None], axis=1)
    damped = np.take_along_axis(damped, backwards[:, None, :], axis=2)
    mean = np.einsum("gii->g", second) / order.shape[1]
    diagonal = np.einsum("gii->gi", damped)  # a view
    diagonal += np.where(mean > 0, DAMPING * mean, 1.0)[:, None]
    lower = np.linalg.cholesky(damped)
    return _inverse_of_upper(lower[:, ::-1, ::-1])


def _inverse_of_upper(upper: Matrix) -> Matrix:
    """By halves: ``[[A, B], [0, C]]⁻¹ = [[A⁻¹, -A⁻¹ B C⁻¹], [0, C⁻¹]]``."""
    size = upper.shape[-1]
    if size <= SMALL:
        return np.linalg.inv(upper)
    half = size // 2
    inverse = np.zeros(upper.shape, np.float32)
    inverse[:, :half, :half] = _inverse_of_upper(upper[:, :half, :half])
    inverse[:, half:, half:] = _inverse_of_upper(upper[:, half:, half:])
    corner = np.matmul(inverse[:, :half, :half], upper[:, :half, half:])
    inverse[:, :half, half:] = -np.matmul(corner, inverse[:, half:, half:])
    return inverse
