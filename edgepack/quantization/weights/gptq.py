"""GPTQ: rounds weights column by column; the columns left compensate for the error (Frantar et al., 2023)."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
"""Single precision takes half the time; damping keeps the factors well conditioned."""

DAMPING = 0.01
"""Share of the mean diagonal that is added to the moments, which few samples leave rank deficient."""
BLOCK = 64
"""Columns per block: errors are compensated within a block, then in all later ones by one matrix product."""
SHRINKAGE = 0.1
"""Weight of the shrinkage: off-diagonal moments of ``n`` positions are scaled by n / (n + this × K)."""
SMALL = 64
"""Triangular matrices up to this size are inverted directly."""


def round_gptq(weight: Matrix, second: Matrix, scale: Matrix, limit: int | Matrix) -> Matrix:
    """Integers in ``[-limit, limit]`` for ``weight`` that keep ``weight @ x``, given ``E[x xᵀ]``.

    Frantar et al. (2023), GPTQ, after Hassibi and Stork (1993): columns are rounded one by one, and the
    error is compensated in the columns left by the inverse second moments. ``weight`` is
    [groups, outputs, K], ``second`` [groups, K, K], ``scale`` [groups, outputs, 1], ``limit`` one number or
    [groups, outputs]. An output keeps
    rounding to nearest where that is better by the same measure, so the result is never worse.
    """
    most = np.broadcast_to(np.asarray(limit, np.float32), scale.shape[:2])
    return store_gptq(weight, second, scale, lambda x: np.clip(np.rint(x), -most, most))


def store_gptq(weight: Matrix, second: Matrix, scale: Matrix, store: Callable[[Matrix], Matrix]) -> Matrix:
    """The same for any set of values: ``store`` gives those nearest to a column [groups, outputs].

    Weights that are zero stay zero.
    """
    columns = (weight / scale).transpose(2, 0, 1)
    nearest = np.where(weight == 0, 0, np.stack([store(column) for column in columns], axis=-1))
    # Columns with large inputs first, while most others are left to compensate.
    order = np.argsort(-np.einsum("gii->gi", second), axis=1, kind="stable")
    columns = np.take_along_axis(weight.transpose(0, 2, 1), order[:, :, None], axis=1)
    rounded = _round_columns(columns, _inverse_factor(second, order), scale[:, :, 0], store)
    inverse = np.argsort(order, axis=1)
    integers = np.take_along_axis(rounded, inverse[:, :, None], axis=1).transpose(0, 2, 1)
    better = output_error(weight, integers * scale, second) < output_error(weight, nearest * scale, second)
    return np.where(better[:, :, None], integers, nearest)


def shrink_moments(second: Matrix, count: int) -> Matrix:
    """Second moments [groups, K, K] of ``count`` positions, off-diagonal elements shrunk towards zero.

    With few positions sample correlations are mostly noise (Ledoit and Wolf, 2004): the fewer, the smaller.
    """
    columns = second.shape[1]
    kept = count / (count + SHRINKAGE * columns)
    shrunk = second * np.float32(kept)
    np.einsum("gii->gi", shrunk)[:] = np.einsum("gii->gi", second)
    return shrunk


def output_error(weight: Matrix, other: Matrix, second: Matrix) -> Matrix:
    """Mean squared difference of the outputs, per group and output: ``d E[x xᵀ] dᵀ``."""
    difference = other - weight
    return np.asarray((np.matmul(difference, second) * difference).sum(-1))


def _round_columns(
    columns: Matrix, factor: Matrix, scale: Matrix, store: Callable[[Matrix], Matrix]
) -> Matrix:
    """Stored values for ``columns`` [groups, K, outputs], in this order; overwrites ``columns``."""
    integers = np.empty_like(columns)
    pruned = columns == 0
    total = columns.shape[1]
    for start in range(0, total, BLOCK):
        stop = min(start + BLOCK, total)
        errors = np.zeros((len(columns), stop - start, columns.shape[2]), np.float32)
        for i in range(start, stop):
            column = columns[:, i]
            if i > start:
                column -= np.matmul(factor[:, None, start:i, i], errors[:, : i - start])[:, 0]
            integers[:, i] = np.where(pruned[:, i], 0, store(column / scale))
            errors[:, i - start] = (column - integers[:, i] * scale) / factor[:, i, i, None]
        columns[:, stop:] -= np.matmul(factor[:, start:stop, stop:].transpose(0, 2, 1), errors)
    return integers


def inverse_factor(second: Matrix) -> Matrix:
    """``U`` [groups, K, K], upper triangular, with ``UᵀU`` the inverse of the damped moments ``second``."""
    return _inverse_factor(second, np.broadcast_to(np.arange(second.shape[1]), second.shape[:2]))


def _inverse_factor(second: Matrix, order: npt.NDArray[np.intp]) -> Matrix:
    """``U``, upper triangular, with ``UᵀU`` the inverse of the damped moments, columns in ``order``.

    With ``J`` the reversal and ``J H J = L Lᵀ``, ``U`` is the inverse of ``J L J``: one Cholesky factor and
    one triangular inverse. Inverting H first would take three times the work and lose precision.
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
    """Inverse by recursive halves: ``[[A, B], [0, C]]⁻¹ = [[A⁻¹, -A⁻¹ B C⁻¹], [0, C⁻¹]]``."""
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
