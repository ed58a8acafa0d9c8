"""Second-order rounding: each weight is rounded so that later ones make up for its error."""

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
"""Single precision: damping keeps the inverse far from its limits, and it takes half the time."""

DAMPING = 0.01
"""Of the mean diagonal, added before the inverse: few samples leave directions that were never seen."""
BLOCK = 128


def round_second_order(weight: Matrix, second: Matrix, scale: Matrix, limit: int) -> Matrix:
    """Integers in ``[-limit, limit]`` for ``weight`` [groups, outputs, K] that keep ``weight @ x``, given ``E[x xᵀ]``.

    Frantar et al. (2023), GPTQ, after Hassibi and Stork (1993): columns are rounded one by one, and what is
    lost is spread over the columns still open through the inverse second moments. ``second`` is
    [groups, K, K], ``scale`` [groups, outputs, 1]. A row keeps plain rounding where that is better by the
    same measure, so the result is never worse than rounding to nearest.
    """
    groups, _, columns = weight.shape
    nearest = np.clip(np.rint(weight / scale), -limit, limit)
    order = np.argsort(-np.einsum("gii->gi", second), axis=1, kind="stable")
    inverse_order = np.argsort(order, axis=1)
    lead = np.arange(groups)[:, None]
    permuted_second = second[lead[..., None], order[:, :, None], order[:, None, :]]
    left = np.take_along_axis(weight, order[:, None, :], axis=2)
    spread = _spread(permuted_second)
    integers = np.zeros_like(left)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = np.zeros((*left.shape[:2], stop - start), np.float32)
        for i in range(start, stop):
            column = left[:, :, i]
            q = np.clip(np.rint(column / scale[:, :, 0]), -limit, limit)
            integers[:, :, i] = q
            error = (column - q * scale[:, :, 0]) / spread[:, None, i, i]
            errors[:, :, i - start] = error
            if i + 1 < stop:
                left[:, :, i + 1 : stop] -= error[:, :, None] * spread[:, None, i, i + 1 : stop]
        if stop < columns:
            left[:, :, stop:] -= np.matmul(errors, spread[:, start:stop, stop:])
    integers = np.take_along_axis(integers, inverse_order[:, None, :], axis=2)
    better = output_error(weight, integers * scale, second) < output_error(weight, nearest * scale, second)
    return np.where(better[:, :, None], integers, nearest)


def output_error(weight: Matrix, other: Matrix, second: Matrix) -> Matrix:
    """Mean squared difference of the outputs, per group and output: ``d E[x xᵀ] dᵀ``."""
    difference = other - weight
    return np.asarray((np.matmul(difference, second) * difference).sum(-1))


def _spread(second: Matrix) -> Matrix:
    """Upper Cholesky factor of the damped inverse, per group."""
    columns = second.shape[-1]
    damping = DAMPING * np.einsum("gii->g", second) / columns + 1e-10
    damped = second + np.eye(columns, dtype=np.float32) * damping[:, None, None].astype(np.float32)
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).transpose(0, 2, 1))
