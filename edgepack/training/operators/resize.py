"""Resize and other resampling; Resize is a matrix product along each axis."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgepack.graph.resampling import Floats, coordinates, nearest
from edgepack.training.step import Operator, Step, integers, pick

OLD_RESIZE = 11
"""The first opset with coordinate modes of Resize; earlier ones are asymmetric and round down."""


def _triangle(distance: Floats) -> Floats:
    weights: Floats = np.maximum(1 - np.abs(distance), 0)
    return weights


def _cubic(distance: Floats, a: float) -> Floats:
    d = np.abs(distance)
    near: Floats = ((a + 2) * d - (a + 3)) * d * d + 1
    far: Floats = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights: Floats = np.where(d <= 1, near, np.where(d < 2, far, 0))
    return weights


def _matrix(step: Step, where: Floats, size: int, scale: float) -> Floats:
    """Weights ``[out, size]`` of linear or cubic interpolation (Keys, 1981)."""
    cubic = step.get("mode") == "cubic"
    stretch = min(scale, 1.0) if step.get("antialias", 0) else 1.0
    reach = math.ceil((2 if cubic else 1) / stretch) + 1
    first = np.floor(where).astype(int)
    taps = first[:, None] + np.arange(1 - reach, reach + 1)
    distance = (taps - where[:, None]) * stretch
    weights = _cubic(distance, step.get("cubic_coeff_a", -0.75)) if cubic else _triangle(distance)
    inside = (taps >= 0) & (taps < size)
    if step.get("exclude_outside", 0):
        weights = np.where(inside, weights, 0)
    weights = weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((len(where), size))
    np.add.at(matrix, (np.arange(len(where))[:, None], np.clip(taps, 0, size - 1)), weights)
    return matrix


def _along(
    step: Step, x: Tensor, axis: int, out: int, scale: float, region: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """``x`` resampled along one axis, and which output positions lie outside of the input."""
    size, old = x.shape[axis], step.opset < OLD_RESIZE
    mode = step.get("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    where = coordinates(mode, size, out, scale, region)
    outside = torch.from_numpy((where < 0) | (where > size - 1))
    if step.get("mode", "nearest") == "nearest":
        rounding = step.get("nearest_mode", "floor" if old else "round_prefer_floor")
        return pick(x, axis, nearest(where, rounding, size).tolist()), outside
    matrix = torch.from_numpy(_matrix(step, where, size, scale)).to(x.dtype)
    return torch.movedim(torch.matmul(torch.movedim(x, axis, -1), matrix.t()), -1, axis), outside


def resize(
    step: Step,
    x: Tensor,
    region: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Resize of opset 10 and later."""
    if step.opset < OLD_RESIZE:  # its second input are the scales
        region, scales = None, region
    axes = [a % x.dim() for a in step.get("axes", range(x.dim()))]
    wanted = integers(sizes) if sizes is not None and sizes.numel() else None
    if wanted is not None:
        ratios = [size / x.shape[a] for size, a in zip(wanted, axes, strict=True)]
        policy = step.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            ratios = [min(ratios) if policy == "not_larger" else max(ratios)] * len(axes)
            wanted = [math.floor(x.shape[a] * r + 0.5) for a, r in zip(axes, ratios, strict=True)]
    else:
        assert scales is not None
        ratios = [float(s) for s in scales.tolist()]
        wanted = [math.floor(x.shape[a] * r + 1e-6) for a, r in zip(axes, ratios, strict=True)]
    return _resample(step, x, axes, wanted, ratios, region)


def _resample(
    step: Step,
    x: Tensor,
    axes: list[int],
    sizes: Sequence[int],
    ratios: Sequence[float],
    region: Tensor | None,
) -> Tensor:
    cropping = step.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    corners = region.tolist() if cropping and region is not None else [0.0] * len(axes) + [1.0] * len(axes)
    for i, (axis, out, ratio) in enumerate(zip(axes, sizes, ratios, strict=True)):
        if out == x.shape[axis] and ratio == 1 and not cropping:
            continue
        x, outside = _along(step, x, axis, out, ratio, (corners[i], corners[len(axes) + i]))
        if cropping and bool(outside.any()):
            mask = outside.reshape([-1 if i == axis else 1 for i in range(x.dim())])
            x = x.masked_fill(mask, step.get("extrapolation_value", 0.0))
    return x


def upsample(step: Step, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """Upsample, the Resize of opsets 7 to 9."""
    ratios = list(step.get("scales")) if scales is None else [float(s) for s in scales.tolist()]
    sizes = [math.floor(size * r + 1e-6) for size, r in zip(x.shape, ratios, strict=True)]
    return _resample(step, x, list(range(x.dim())), sizes, ratios, None)


GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def grid_sample(step: Step, x: Tensor, grid: Tensor) -> Tensor:
    """GridSample."""
    mode = step.get("mode", "linear")
    padding, corners = step.get("padding_mode", "zeros"), bool(step.get("align_corners", 0))
    return functional.grid_sample(x, grid, GRID_MODES.get(mode, mode), padding, corners)


def affine_grid(step: Step, theta: Tensor, size: Tensor) -> Tensor:
    """AffineGrid."""
    return functional.affine_grid(theta, integers(size), bool(step.get("align_corners", 0)))


OPERATORS: dict[str, Operator] = {
    "AffineGrid": affine_grid,
    "GridSample": grid_sample,
    "Resize": resize,
    "Upsample": upsample,
}
