"""Source coordinates of Resize, as the ONNX operator defines them."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
ROUNDINGS: dict[str, Callable[[Floats], Floats]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}
"""Rounding functions by ``nearest_mode``."""


def coordinates(
    mode: str, size: int, out: int, scale: float, region: tuple[float, float] = (0.0, 1.0)
) -> Floats:
    """The source coordinate of each of ``out`` entries, in an axis of ``size`` entries.

    ``mode``: the ``coordinate_transformation_mode``; ``region``: the region of ``tf_crop_and_resize``.
    """
    at = np.arange(out, dtype=np.float64)
    if mode == "asymmetric":
        return at / scale
    if mode == "align_corners":
        return at * ((size - 1) / max(out - 1, 1))
    if mode == "tf_crop_and_resize":
        first, last = region[0] * (size - 1), region[1] * (size - 1)
        return first + at * (last - first) / (out - 1) if out > 1 else (first + last) / 2 + at
    if mode == "pytorch_half_pixel" and out == 1:
        return at * 0.0
    shift = size / 2 * (1 - out / (scale * size)) if mode == "half_pixel_symmetric" else 0.0
    return shift + (at + 0.5) / scale - 0.5


def nearest(where: Floats, rounding: str, size: int) -> npt.NDArray[np.int64]:
    """The source indices nearest to the coordinates ``where``, in an axis of ``size`` entries."""
    return np.clip(ROUNDINGS[rounding](where), 0, size - 1).astype(np.int64)
