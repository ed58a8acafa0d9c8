"""Which weights become zero, and how the others make up for them. Arrays only; knows nothing of ONNX."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgepack.quantization.weights.gptq import inverse_factor, output_error

Matrix = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

BLOCK = 64
"""Columns whose errors are spread within the block first, then to all others by one product."""
ROUNDS = 6
"""Of conjugate gradients, after which the weights that are left are as good as fitted."""
FIT_DAMPING = 0.1
"""Of the moments that the weights that are left are fitted to. On samples that were not used, 0.01 gives
EfficientNet-Lite0's classifier an error of 0.117 and this 0.101; where there are many rows both are equal."""


class Pattern(NamedTuple):
    """At most ``kept`` of ``of`` weights in a row of inputs; (0, 0) where zeros may lie anywhere."""

    kept: int = 0
    of: int = 0


def salience(weight: Matrix, second: Matrix | None, method: str) -> Matrix:
    """What it costs to set each of ``weight`` [groups, outputs, K] to zero, each alone.

    ``l1`` is the magnitude, ``l2`` its square; ``wanda`` the square times the mean square of the input (Sun
    et al., 2023), ``second_order`` the square over the diagonal of the inverse moments (Hassibi and Stork,
    1993: the others make up for the loss). ``second``: mean products of the inputs, [groups, K, K].
    """
    if method == "l1":
        return np.abs(weight)
    if method == "l2" or second is None:
        return weight**2
    if method == "wanda":
        return np.asarray(weight**2 * np.einsum("gii->gi", second)[:, None])
    # The diagonal of UᵀU, the inverse, is the squared length of the columns of U.
    return np.asarray(weight**2 / (inverse_factor(second) ** 2).sum(axis=1)[:, None])


def damped(second: Matrix, damping: float) -> Matrix:
    """Moments [groups, K, K] with a share of their mean square added to the diagonal: changes that samples
    do not speak against cost something all the same."""
    mean = np.einsum("gii->g", second)[:, None] / second.shape[1]
    more = second.copy()
    diagonal = np.einsum("gii->gi", more)  # a view
    diagonal += np.float32(damping) * mean
    return more


def lowest(cost: Matrix, count: int) -> Mask:
    """The ``count`` lowest of ``cost``, ties by position."""
    mask = np.zeros(cost.size, np.bool_)
    if count > 0:
        mask[np.argsort(cost.reshape(-1), kind="stable")[:count]] = True
    return mask.reshape(cost.shape)


def lowest_in_rows(cost: Matrix, pattern: Pattern) -> Mask:
    """The lowest ``of - kept`` of every ``of`` along the last axis; a rest shorter than that stays."""
    whole = cost.shape[-1] // pattern.of * pattern.of
    mask = np.zeros(cost.shape, np.bool_)
    parts = cost[..., :whole].reshape(*cost.shape[:-1], -1, pattern.of)
    ranks = parts.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
    mask[..., :whole] = (ranks < pattern.of - pattern.kept).reshape(*cost.shape[:-1], whole)
    return mask


def prune_obs(weight: Matrix, second: Matrix, sparsity: float, pattern: Pattern) -> Matrix:
    """``weight`` [groups, outputs, K] with zeros, the rest changed so that ``weight @ x`` is kept.

    Frantar and Alistarh (2023), SparseGPT: columns are passed in order; in each block of them the weights
    that cost least by then become zero, and what is lost is spread over the columns still open. Columns that
    were passed cannot make up for later ones; once it is known which weights are left, all are fitted
    together. A group where the same number of zeros by magnitude loses less, which happens with few outputs,
    has those.
    """
    changed = _solved(weight, second, sparsity, pattern)
    cost = np.abs(weight)
    if pattern.of:
        mask = lowest_in_rows(cost, pattern)
    else:
        mask = np.stack([lowest(c, int((w == 0).sum())) for c, w in zip(cost, changed, strict=True)])
    plain = np.where(mask, np.float32(0), weight)
    better = output_error(weight, changed, second).sum(1) < output_error(weight, plain, second).sum(1)
    return _fitted(weight, np.where(better[:, None, None], changed, plain), damped(second, FIT_DAMPING))


def _solved(weight: Matrix, second: Matrix, sparsity: float, pattern: Pattern) -> Matrix:
    factor = inverse_factor(second)
    columns = np.array(weight.transpose(0, 2, 1), np.float32)
    total = columns.shape[1]
    step = BLOCK if not pattern.of else max(BLOCK // pattern.of, 1) * pattern.of
    for start in range(0, total, step):
        stop = min(start + step, total)
        diagonal = np.einsum("gii->gi", factor)[:, start:stop, None]
        mask = _block_mask((columns[:, start:stop] / diagonal) ** 2, sparsity, pattern)
        errors = np.zeros((len(columns), stop - start, columns.shape[2]), np.float32)
        for i in range(start, stop):
            column = columns[:, i]
            if i > start:
                column -= np.matmul(factor[:, None, start:i, i], errors[:, : i - start])[:, 0]
            kept = np.where(mask[:, i - start], 0, column)
            errors[:, i - start] = (column - kept) / factor[:, i, i, None]
            columns[:, i] = kept
        columns[:, stop:] -= np.matmul(factor[:, start:stop, stop:].transpose(0, 2, 1), errors)
    return columns.transpose(0, 2, 1)


def _fitted(weight: Matrix, sparse: Matrix, second: Matrix) -> Matrix:
    """``sparse`` with its weights nearer to the least squares of their outputs; zeros stay.

    Conjugate gradients for all outputs at once, scaled by the diagonal; no round makes an output worse.
    """
    mask = sparse != 0
    inverse = 1 / np.maximum(np.einsum("gii->gi", second), 1e-30)[:, None]
    found = sparse.copy()
    left = np.matmul(weight - sparse, second) * mask
    scaled = left * inverse
    step, size = scaled, (left * scaled).sum(-1, keepdims=True)
    for _ in range(ROUNDS):
        product = np.matmul(step, second) * mask
        curvature = (step * product).sum(-1, keepdims=True)
        length = np.divide(size, curvature, out=np.zeros_like(size), where=curvature > 1e-30)
        found += length * step
        left = left - length * product
        scaled = left * inverse
        before, size = size, (left * scaled).sum(-1, keepdims=True)
        step = scaled + np.divide(size, before, out=np.zeros_like(size), where=before > 1e-30) * step
    worse = output_error(weight, found, second) > output_error(weight, sparse, second)
    return np.where(worse[:, :, None], sparse, found)


def _block_mask(cost: Matrix, sparsity: float, pattern: Pattern) -> Mask:
    """Of ``cost`` [groups, columns, outputs]: each group loses its share, each output its pattern."""
    if pattern.of:
        return lowest_in_rows(cost.transpose(0, 2, 1), pattern).transpose(0, 2, 1)
    count = round(sparsity * cost[0].size)
    return np.stack([lowest(group, count) for group in cost])


def rates(costs: Sequence[Matrix], sparsity: float, most: float) -> list[float]:
    """The share of zeros for each weight, so that all together have ``sparsity``.

    One threshold on the cost over the sum of costs of its layer, so that each layer loses the same for its
    last zero; none loses more than ``most``. (The energy of the layer's output is a worse measure: half of
    EfficientNet-Lite0 at zero keeps 0.755 of its decisions, with the sum 0.905; one rate for all 0.565.)
    """
    sums = [max(float(cost.sum(dtype=np.float64)), 1e-30) for cost in costs]
    relative = [np.sort(cost.reshape(-1) / s) for cost, s in zip(costs, sums, strict=True)]
    wanted = sparsity * sum(r.size for r in relative)
    low, high = -60.0, 12.0  # decimal exponents
    shares = [0.0] * len(relative)
    for _ in range(60):
        middle = (low + high) / 2
        shares = [min(float(np.searchsorted(r, 10.0**middle)) / r.size, most) for r in relative]
        if sum(s * r.size for s, r in zip(shares, relative, strict=True)) < wanted:
            low = middle
        else:
            high = middle
    return shares
