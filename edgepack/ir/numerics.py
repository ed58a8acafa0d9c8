"""Quantization arithmetic in plain NumPy, independent of ONNX."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgepack.ir.scheme import QuantParams, QuantScheme, QuantType

Array = npt.NDArray[np.floating]

MIN_SCALE = np.float32(1e-18)
"""Smallest scale: the product of two, the scale of a bias, is still a normal float32."""
FLOAT32_MAX = float(np.finfo(np.float32).max)
CHUNK = 1 << 22
"""Values quantized at a time."""


def choose_params(low: float, high: float, scheme: QuantScheme) -> QuantParams:
    """Per-tensor parameters that cover ``[low, high]`` (real values; zero is always included).

    Asymmetric: the zero point is an exact stored integer, so that zero padding is exact. Symmetric: the zero
    point is the middle of the type (0 for int8, 128 for uint8). A range of zero alone does not determine the
    scale; it is 1 then, because the smallest scale would make requantization factors overflow.

    Raises:
        ValueError: a bound is not a finite float32, or ``low > high``.
    """
    if not -FLOAT32_MAX <= low <= high <= FLOAT32_MAX:
        raise ValueError(f"not a range: [{low}, {high}]")
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if low == high:
        high = float(scheme.type.qmax - scheme.type.qmin)
    qmin, qmax = scheme.type.qmin, scheme.type.qmax
    if scheme.symmetric:
        middle = 0 if qmin < 0 else (qmin + qmax + 1) // 2
        scale = np.float32(max(max(-low, high) / (qmax - middle), float(MIN_SCALE)))
        return QuantParams(scheme.type, np.asarray(scale), np.asarray(middle, scheme.type.dtype))
    scale = np.float32(max((high - low) / (qmax - qmin), float(MIN_SCALE)))
    zero_point = int(np.clip(round(qmin - low / float(scale)), qmin, qmax))
    return QuantParams(scheme.type, np.asarray(scale), np.asarray(zero_point, scheme.type.dtype))


def weight_limit(scheme: QuantScheme) -> int:
    """The largest stored magnitude of a weight."""
    return scheme.type.qmax >> max(8 - scheme.bits, int(scheme.reduce_range))


def choose_weight_params(weight: Array, scheme: QuantScheme, axis: int | None) -> QuantParams:
    """Symmetric parameters for a weight, one scale per index of ``axis`` (``None``: one for all).

    The range used is ``[-qmax, qmax]``: the additional negative value would make the quantization levels
    asymmetric and, on x86 without VNNI, lets ``-128 × 255`` pairs saturate.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    qmax = weight_limit(scheme)
    other = tuple(i for i in range(weight.ndim) if i != axis) if axis is not None else None
    # Not np.abs: the weight may be large and memory-mapped.
    peak = np.maximum(-weight.min(axis=other, initial=0.0), weight.max(axis=other, initial=0.0))
    if not np.isfinite(peak).all():
        raise ValueError("a weight holds NaN or infinity")
    scale = np.maximum(peak / qmax, MIN_SCALE).astype(np.float32)
    return QuantParams(scheme.type, scale, np.zeros(scale.shape, scheme.type.dtype), axis)


def _spread(params: QuantParams, ndim: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Scale and zero point, reshaped to broadcast against a tensor of ``ndim`` dimensions."""
    zero_point = params.zero_point.astype(np.int32)
    if params.axis is None:
        return params.scale, zero_point
    shape = [1] * ndim
    shape[params.axis] = -1
    return params.scale.reshape(shape), zero_point.reshape(shape)


def quantize(x: Array, params: QuantParams) -> npt.NDArray[np.integer]:
    """Stored values of ``x``: round half to even, add the zero point, saturate (ONNX QuantizeLinear)."""
    scale, zero_point = _spread(params, x.ndim)
    if x.size > CHUNK and len(x) > 1:  # in chunks: the intermediate arrays take up to 20 bytes a value
        scale, zero_point = np.broadcast_to(scale, x.shape), np.broadcast_to(zero_point, x.shape)
        stored = np.empty(x.shape, params.type.dtype)
        rows = -(-len(x) * CHUNK // x.size)
        for part in (slice(start, start + rows) for start in range(0, len(x), rows)):
            stored[part] = _stored(x[part], scale[part], zero_point[part], params)
        return stored
    return _stored(x, scale, zero_point, params)


def _stored(
    x: Array, scale: npt.NDArray[np.float32], zero_point: npt.NDArray[np.int32], params: QuantParams
) -> npt.NDArray[np.integer]:
    q = np.clip(np.rint(x / scale) + zero_point, params.type.qmin, params.type.qmax)
    return np.asarray(q, params.type.dtype)


def dequantize(q: npt.NDArray[np.integer], params: QuantParams) -> npt.NDArray[np.float32]:
    """Real values of stored ``q`` (ONNX DequantizeLinear)."""
    scale, zero_point = _spread(params, q.ndim)
    return np.asarray((q.astype(np.int32) - zero_point).astype(np.float32) * scale, np.float32)


def bias_params(input_scale: npt.NDArray[np.float32], weight: QuantParams) -> QuantParams:
    """Parameters of an int32 bias: its scale is the product of the input scale and the weight scale."""
    scale = (np.asarray(input_scale, np.float32) * weight.scale).astype(np.float32)
    axis = None if weight.axis is None else 0
    return QuantParams(QuantType.INT32, scale, np.zeros(scale.shape, np.int32), axis)


def sqnr_db(reference: Sequence[Array] | Array, other: Sequence[Array] | Array) -> float:
    """Signal to quantization noise ratio in dB over all arrays together; ``inf`` when they are equal.

    Raises:
        ValueError: the two sides differ in number or shapes.
    """
    left = [reference] if isinstance(reference, np.ndarray) else list(reference)
    right = [other] if isinstance(other, np.ndarray) else list(other)
    signal = noise = 0.0
    for a, b in zip(left, right, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
        a64 = a.astype(np.float64)
        signal += float((a64**2).sum())
        noise += float(((a64 - b) ** 2).sum())
    return ratio_db(signal, noise)


def ratio_db(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` in dB: ``inf`` without noise, ``-inf`` without signal."""
    if noise == 0.0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def short_scale(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """``scale`` rounded to eight significant bits, as bfloat16: half of its bytes are zero then.

    For scales that weights are quantized with afterwards; it changes them by 0.2% at most.
    """
    fraction, exponent = np.frexp(scale)
    return np.asarray(np.ldexp(np.rint(fraction * 256) / 256, exponent), np.float32)
