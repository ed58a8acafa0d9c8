"""Allocates sparsity to weights by its measured effect on the model's outputs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.compression.sensitivity import noise_alone, outputs_of
from edgepack.compression.weights import write_weight
from edgepack.data.samples import Samples
from edgepack.ir.model import clone
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.weights.gptq import Matrix, output_error
from edgepack.quantization.weights.moments import InputMoments

SHARES = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Sparsities at which the error of a weight is measured; a power law interpolates between them."""
MIDDLE = 2
"""Index in :data:`SHARES` at which the effect on the model's outputs is measured."""
DAMPINGS = (0.0, 0.1, 1.0)
"""Candidate dampings of the moments; the best for each weight is chosen on the other half of the samples."""
FINE = 0.005
"""Step of the allocated sparsities."""

Zeroed = Callable[[Matrix, InputMoments, float, float], Matrix]
"""``zeroed(weight, moments, share, damping)``: the weight with this share of zeros, the rest refitted."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Noise at the model's outputs for the sparsities :data:`SHARES` of one weight."""

    values: int
    damping: float
    noise: tuple[float, ...]


def noise_curves(
    model: ir.Model,
    weights: Iterable[tuple[FusionGroup, Matrix, InputMoments, InputMoments]],
    zeroed: Zeroed,
    judging: Samples,
    threads: int,
) -> dict[str, Curve]:
    """A curve for each of ``weights``, given with the moments of its inputs on two halves of the samples.

    Weights are fitted on one half and evaluated on the other, both ways, because a weight with many inputs
    and few samples overfits. ``judging`` are the samples of the second half, on which the effect of one
    fusion group on the outputs is measured. Noise of several groups is taken as additive.

    Raises:
        CalibrationError: the model fails on a sample.
    """
    changed = clone(model)
    nodes = {n.name: n for n in changed.graph}
    errors: dict[str, tuple[int, float, npt.NDArray[np.float64]]] = {}
    measured: dict[str, float] = {}
    for group, weight, first, second in weights:
        name = group.name
        by_damping = {d: _judged(weight, first, second, zeroed, SHARES[MIDDLE], d) for d in DAMPINGS}
        damping = min(by_damping, key=lambda d: by_damping[d].error)
        found = [
            by_damping[damping] if place == MIDDLE else _judged(weight, first, second, zeroed, share, damping)
            for place, share in enumerate(SHARES)
        ]
        errors[name] = weight.size, damping, np.maximum.accumulate([f.error for f in found])
        measured[name] = found[MIDDLE].second_error
        write_weight(changed.graph, nodes[name], weight, found[MIDDLE].weight, first, "alone")
    reference = outputs_of(model, judging, threads)
    alone = noise_alone(model, changed, list(errors), reference, judging, threads)
    gains = {n: alone[n] / measured[n] for n in errors if alone[n] > 0 and measured[n] > 0}
    usual = float(np.median(list(gains.values()))) if gains else 1.0
    return {
        name: Curve(size, damping, tuple((gains.get(name, usual) * error).tolist()))
        for name, (size, damping, error) in errors.items()
    }


class _Judged(NamedTuple):
    weight: Matrix
    """Fitted on the first half."""
    second_error: float
    """Its error on the second half."""
    error: float
    """Mean cross-validation error."""


def _judged(
    weight: Matrix, first: InputMoments, second: InputMoments, zeroed: Zeroed, share: float, damping: float
) -> _Judged:
    one, other = (zeroed(weight, moments, share, damping) for moments in (first, second))
    error = _relative_error(weight, one, second)
    return _Judged(one, error, (error + _relative_error(weight, other, first)) / 2)


def _relative_error(weight: Matrix, other: Matrix, moments: InputMoments) -> float:
    """Relative squared error of the outputs; of the weight where the inputs are unknown."""
    if moments.second is None or not moments.count:
        return float(np.square(weight - other).sum() / max(np.square(weight).sum(), 1e-30))
    power = output_error(weight, np.zeros_like(weight), moments.second).sum(dtype=np.float64)
    return float(output_error(weight, other, moments.second).sum(dtype=np.float64) / max(power, 1e-30))


def allocate(curves: Mapping[str, Curve], sparsity: float, most: float) -> dict[str, float]:
    """Sparsities with a total of ``sparsity``, none above ``most``, and the least sum of noise.

    Lagrangian allocation (Shoham and Gersho, 1988): all weights have the same slope of noise per zero, which
    is found by bisection.
    """
    shares = np.arange(0, most + FINE / 2, FINE)
    hulls = {name: _hull(shares, _at(curve, shares)) for name, curve in curves.items()}
    sizes = np.array([c.values for c in curves.values()], np.float64)

    def chosen(price: float) -> npt.NDArray[np.float64]:
        best = [np.argmin(hulls[n] - price * c.values * shares) for n, c in curves.items()]
        return np.asarray(shares[best])

    low, high = -40.0, 20.0  # decimal exponents
    for _ in range(70):
        middle = (low + high) / 2
        few = chosen(10.0**middle) @ sizes < sparsity * sizes.sum()
        low, high = (middle, high) if few else (low, middle)
    below, above = chosen(10.0**low), chosen(10.0**high)
    # On a straight part of a hull the slope is constant: interpolate to the total.
    gap = (above - below) @ sizes
    part = (sparsity * sizes.sum() - below @ sizes) / gap if gap > 0 else 1.0
    found = below + np.clip(part, 0, 1) * (above - below)
    return dict(zip(curves, found.tolist(), strict=True))


def _at(curve: Curve, shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Noise at any sparsity: linear interpolation and extrapolation of logarithms."""
    x, y = np.log(SHARES), np.log(np.maximum(curve.noise, 1e-30))
    slopes = np.diff(y) / np.diff(x)
    at = np.log(np.maximum(shares, 1e-9))
    place = np.clip(np.searchsorted(x, at) - 1, 0, len(slopes) - 1)
    # A positive slope, so that more zeros are never better than fewer.
    noise = np.exp(y[place] + np.maximum(slopes[place], 1.0) * (at - x[place]))
    return np.where(shares > 0, noise, 0.0)


def _hull(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The lower convex hull of a curve at its own x."""
    kept: list[int] = []
    for i in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(i)
    return np.interp(x, x[kept], y[kept])
