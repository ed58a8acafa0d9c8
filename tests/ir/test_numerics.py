"""Arithmetic compared with onnxruntime, and properties of the parameters."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.onnx_models import parse

from edgepack.ir.numerics import (
    CHUNK,
    FLOAT32_MAX,
    MIN_SCALE,
    bias_params,
    choose_params,
    choose_weight_params,
    dequantize,
    quantize,
    ratio_db,
    short_scale,
    sqnr_db,
)
from edgepack.ir.scheme import QuantParams, QuantScheme, QuantType

TYPES = [QuantType.INT8, QuantType.UINT8, QuantType.INT16, QuantType.UINT16]
Array = npt.NDArray[np.float32]
numbers = st.floats(-1e6, 1e6, width=32)
bounds = st.tuples(numbers, numbers).map(lambda pair: (min(pair), max(pair)))


def runtime(kind: QuantType, axis: int | None) -> ort.InferenceSession:
    """Quantize and dequantize with parameters given as inputs."""
    shape = "" if axis is None else "[C]"
    model = parse(
        f"""q (float[A, C] x, float{shape} s, {kind}{shape} z) => ({kind}[A, C] q, float[A, C] y) {{
            q = QuantizeLinear <axis = 1> (x, s, z)
            y = DequantizeLinear <axis = 1> (q, s, z)
        }}""",
        opset=21,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


SESSIONS = {(kind, axis): runtime(kind, axis) for kind in TYPES for axis in (None, 1)}


@given(x=arrays(np.float32, (3, 4), elements=numbers), bounds=bounds, kind=st.sampled_from(TYPES))
@settings(deadline=None)
def test_same_stored_and_real_values_as_the_runtime(
    x: Array, bounds: tuple[float, float], kind: QuantType
) -> None:
    params = choose_params(*bounds, QuantScheme(kind, symmetric=False))
    q, y = SESSIONS[kind, None].run(None, {"x": x, "s": params.scale, "z": params.zero_point})
    np.testing.assert_array_equal(quantize(x, params), q)
    np.testing.assert_array_equal(dequantize(quantize(x, params), params), y)


@given(
    x=arrays(np.float32, (5, 3), elements=numbers),
    scale=arrays(np.float32, 3, elements=st.floats(2**-10, 2**10, width=32)),
    zero=st.lists(st.integers(-128, 127), min_size=3, max_size=3),
)
@settings(deadline=None)
def test_same_as_the_runtime_per_channel(x: Array, scale: Array, zero: list[int]) -> None:
    params = QuantParams(QuantType.INT8, scale, np.asarray(zero, np.int8), axis=1)
    q, y = SESSIONS[QuantType.INT8, 1].run(None, {"x": x, "s": scale, "z": params.zero_point})
    np.testing.assert_array_equal(quantize(x, params), q)
    np.testing.assert_array_equal(dequantize(q, params), y)


def test_ties_go_to_even() -> None:
    params = QuantParams(QuantType.INT8, np.asarray(2, np.float32), np.asarray(1, np.int8))
    x = np.asarray([-5, -3, -1, 1, 3, 5, 1e9, -1e9], np.float32)
    assert quantize(x, params).tolist() == [-1, -1, 1, 1, 3, 3, 127, -128]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_a_large_array_is_quantized_in_chunks_to_the_same_values(axis: int | None) -> None:
    x = np.random.default_rng(0).standard_normal((CHUNK // 1000, 1500), dtype=np.float32)
    channels = () if axis is None else (x.shape[axis],)
    scale = np.random.default_rng(1).uniform(0.01, 0.1, channels).astype(np.float32)
    params = QuantParams(QuantType.INT8, scale, np.zeros(channels, np.int8), axis)
    assert x.size > CHUNK
    by_hand = scale[:, None] if axis == 0 else scale
    np.testing.assert_array_equal(quantize(x, params), np.clip(np.rint(x / by_hand), -128, 127))


@given(bounds=bounds, kind=st.sampled_from(TYPES), symmetric=st.booleans())
def test_zero_is_exact_and_bounds_are_covered_within_half_a_step(
    bounds: tuple[float, float], kind: QuantType, symmetric: bool
) -> None:
    params = choose_params(*bounds, QuantScheme(kind, symmetric))
    zero = dequantize(quantize(np.zeros(1, np.float32), params), params)
    assert zero[0] == 0.0
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    ends = np.asarray([low, high], np.float32)
    error = np.abs(dequantize(quantize(ends, params), params) - ends)
    assert error.max() <= float(params.scale) * 0.5 * (1 + 1e-3)
    if symmetric:
        assert int(params.zero_point) == {"int8": 0, "uint8": 128, "int16": 0, "uint16": 32768}[kind]


def test_a_tiny_range_has_a_scale_without_overflow() -> None:
    params = choose_params(0.0, 1e-30, QuantScheme(QuantType.UINT8, symmetric=False))
    assert int(params.zero_point) == 0
    assert params.scale == MIN_SCALE
    assert bias_params(params.scale, params).scale >= np.finfo(np.float32).tiny


def test_the_whole_of_float32_is_a_range() -> None:
    params = choose_params(-FLOAT32_MAX, FLOAT32_MAX, QuantScheme(QuantType.UINT8, symmetric=False))
    assert np.isfinite(params.scale)


@pytest.mark.parametrize(
    "low, high", [(1.0, 0.0), (np.nan, 1.0), (0.0, np.nan), (-np.inf, 0.0), (0.0, np.inf), (0.0, 1e39)]
)
def test_an_invalid_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="not a range"):
        choose_params(low, high, QuantScheme(QuantType.UINT8, symmetric=False))


@given(
    weight=arrays(np.float32, (4, 3, 2), elements=st.floats(-100, 100, width=32)),
    axis=st.sampled_from([None, 0, 1, 2]),
    reduce_range=st.booleans(),
)
def test_weights_use_the_whole_symmetric_range(weight: Array, axis: int | None, reduce_range: bool) -> None:
    scheme = QuantScheme(QuantType.INT8, symmetric=True, reduce_range=reduce_range)
    params = choose_weight_params(weight, scheme, axis)
    stored = quantize(weight, params)
    limit = 63 if reduce_range else 127
    assert params.scale.shape == (() if axis is None else (weight.shape[axis],))
    assert np.abs(stored.astype(int)).max() <= limit
    error = np.abs(dequantize(stored, params) - weight)
    steps = (
        params.scale
        if axis is None
        else np.moveaxis(np.broadcast_to(params.scale, (1, 1, weight.shape[axis])), 2, axis)
    )
    assert (error <= 0.5 * steps * (1 + 1e-3)).all()
    if np.abs(weight).max() > 1e-10:
        assert np.abs(stored.astype(int)).max() == limit


def test_channels_of_a_weight_have_scales_of_their_own() -> None:
    weight = np.asarray([[1.0, -127.0], [0.5, 0.0], [0.0, 0.0]], np.float32)
    params = choose_weight_params(weight, QuantScheme(QuantType.INT8, symmetric=True), 0)
    np.testing.assert_allclose(params.scale, [1.0, 0.5 / 127, float(MIN_SCALE)])
    assert quantize(weight, params).tolist() == [[1, -127], [127, 0], [0, 0]]


def test_an_empty_weight_has_a_scale_per_channel() -> None:
    params = choose_weight_params(
        np.zeros((3, 0), np.float32), QuantScheme(QuantType.INT8, symmetric=True), 0
    )
    assert params.scale.shape == (3,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_weight_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        choose_weight_params(
            np.asarray([[1.0, bad]], np.float32), QuantScheme(QuantType.INT8, symmetric=True), 0
        )


def test_the_scale_of_a_bias_is_the_product_of_both() -> None:
    weight = QuantParams(QuantType.INT8, np.asarray([0.5, 0.25], np.float32), np.zeros(2, np.int8), axis=3)
    params = bias_params(np.asarray(0.1, np.float32), weight)
    np.testing.assert_allclose(params.scale, [0.05, 0.025], rtol=1e-6)
    assert (params.type, params.axis) == (QuantType.INT32, 0)
    stored = quantize(np.asarray([1.0, -1.0], np.float32), params)
    assert stored.dtype == np.dtype(np.int32)
    assert stored.tolist() == [20, -40]
    whole = bias_params(
        np.asarray(0.1, np.float32),
        QuantParams(QuantType.INT8, np.asarray(0.5, np.float32), np.zeros((), np.int8)),
    )
    assert (whole.axis, whole.scale.shape) == (None, ())


def test_a_bias_saturates_at_32_bits() -> None:
    params = QuantParams(QuantType.INT32, np.asarray(1e-6, np.float32), np.zeros((), np.int32))
    assert quantize(np.asarray([1e6, -1e6], np.float32), params).tolist() == [2**31 - 1, -(2**31)]


def test_sqnr_of_known_noise() -> None:
    signal = np.full(100, 10.0, np.float32)
    assert sqnr_db(signal, signal + 1) == pytest.approx(20.0)
    assert sqnr_db([signal, signal], [signal + 1, signal]) == pytest.approx(23.0103, abs=1e-3)
    assert sqnr_db(signal, signal) == np.inf
    assert ratio_db(0.0, 1.0) == -np.inf


def test_sqnr_of_what_does_not_match_is_refused() -> None:
    one = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="shapes differ"):
        sqnr_db(one, np.zeros(4, np.float32))
    with pytest.raises(ValueError):
        sqnr_db([one], [one, one])


def test_parameters_are_equal_by_content() -> None:
    scheme = QuantScheme(QuantType.UINT8, symmetric=False)
    assert choose_params(0, 1, scheme) == choose_params(0, 1, scheme)
    assert choose_params(0, 1, scheme) != choose_params(0, 2, scheme)
    assert choose_params(0, 1, scheme) != "something else"


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_range_of_zero_alone_has_the_scale_one(symmetric: bool) -> None:
    params = choose_params(0.0, -0.0, QuantScheme(QuantType.INT8, symmetric=symmetric))
    assert 1 <= float(params.scale) < 3
    assert float(dequantize(quantize(np.zeros(1, np.float32), params), params)[0]) == 0.0


@given(arrays(np.float32, (6,), elements=st.floats(2.0**-100, 2.0**100, width=32)))
def test_short_scales_are_near_and_have_two_empty_bytes(scale: Array) -> None:
    short = short_scale(scale)
    assert (short.view(np.uint32) & 0xFFFF == 0).all()
    assert (np.abs(short - scale) <= scale / 256).all()
    assert np.array_equal(short_scale(short), short)
