"""Moments of the inputs of weights, GPTQ, and bias correction."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.onnx_models import Array, f32, parse, run

from edgepack.calibration.run import calibrate, stream_activations
from edgepack.config.recipe import Calibration, Data
from edgepack.config.target import load_target
from edgepack.data.samples import Samples, open_samples
from edgepack.graph.normalize import normalize
from edgepack.ir.inputs import input_specs
from edgepack.ir.numerics import choose_weight_params, dequantize
from edgepack.ir.scheme import QuantScheme, QuantType
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.plan.plan import make_plan, tensors_to_observe
from edgepack.quantization.plan.types import Precision, QuantPlan, Request
from edgepack.quantization.weights import moments as moments_module
from edgepack.quantization.weights.gptq import output_error, round_gptq
from edgepack.quantization.weights.matrix import from_groups, to_groups, weight_of
from edgepack.quantization.weights.moments import POSITIONS, InputMoments, stream_moments, weight_inputs
from edgepack.quantization.weights.rounding import Rounder, round_weights

Floats = npt.NDArray[np.float32]
WEIGHTS = QuantScheme(QuantType.INT8, symmetric=True)


def conv(shape: str, weight: Array, attributes: str) -> ir.Model:
    return parse(
        f"net (float[{shape}] x) => (float y) "
        f"{{ y = Conv {f'<{attributes}>' if attributes else ''} (x, w) }}",
        weights={"w": weight},
    )


CASES = [
    pytest.param((2, 3, 7), (4, 3, 3), "", id="1-D"),
    pytest.param(
        (1, 4, 9), (4, 2, 4), "group = 2, strides = [2], dilations = [2], pads = [1, 3]", id="1-D all"
    ),
    pytest.param((1, 3, 6, 5), (4, 3, 1, 1), "", id="1x1"),
    pytest.param((2, 3, 6, 5), (4, 3, 1, 1), "strides = [2, 3]", id="1x1 strided"),
    pytest.param((1, 3, 6, 5), (4, 3, 3, 3), "pads = [1, 1, 1, 1]", id="same by pads"),
    pytest.param((1, 3, 9, 8), (2, 3, 3, 2), "pads = [0, 1, 2, 3], strides = [2, 1]", id="uneven pads"),
    pytest.param((1, 3, 9, 9), (2, 3, 3, 3), "dilations = [3, 2]", id="dilation"),
    pytest.param((1, 6, 5, 5), (6, 1, 3, 3), "group = 6, pads = [1, 1, 1, 1]", id="depthwise"),
    pytest.param(
        (2, 6, 5, 5), (12, 1, 3, 3), "group = 6, strides = [2, 2]", id="depthwise, two outputs each"
    ),
    pytest.param((1, 6, 5, 5), (4, 3, 3, 3), "group = 2", id="groups"),
    pytest.param((1, 2, 8, 7), (3, 2, 3, 4), 'auto_pad = "SAME_UPPER", strides = [2, 2]', id="SAME_UPPER"),
    pytest.param((1, 2, 8, 7), (3, 2, 4, 2), 'auto_pad = "SAME_LOWER", strides = [3, 2]', id="SAME_LOWER"),
    pytest.param((1, 2, 9, 9), (3, 2, 3, 3), 'auto_pad = "VALID", strides = [2, 2]', id="VALID"),
    pytest.param((1, 2, 4, 4, 5), (4, 2, 2, 3, 2), "pads = [1, 0, 1, 0, 1, 0]", id="3-D"),
    pytest.param((1, 4, 4, 3, 5), (4, 1, 2, 2, 2), "group = 4, strides = [2, 1, 2]", id="3-D depthwise"),
]


@pytest.mark.parametrize("x_shape, w_shape, attributes", CASES)
def test_weight_times_its_inputs_is_the_convolution(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], attributes: str
) -> None:
    rng = np.random.default_rng(0)
    x, weight = f32(rng.normal(size=x_shape)), f32(rng.normal(size=w_shape))
    model = conv(",".join(map(str, x_shape)), weight, attributes)
    y = run(model, {"x": x})["y"]
    node = model.graph[0]
    columns = weight_inputs(node, x, rng)
    product = np.matmul(to_groups(node, weight_of(node)), columns)  # [groups, outputs, images * positions]
    product = product.reshape(y.shape[1], y.shape[0], -1).transpose(1, 0, 2)
    np.testing.assert_allclose(product.reshape(y.shape), y, atol=1e-5)


@pytest.mark.parametrize("images", [1, 3, 40])
def test_of_many_positions_some_are_sampled(images: int) -> None:
    rng = np.random.default_rng(0)
    x, weight = f32(rng.normal(size=(images, 3, 20, 20))), f32(rng.normal(size=(5, 3, 3, 3)))
    model = conv(f"{images}, 3, 20, 20", weight, "pads = [1, 1, 1, 1]")
    y = run(model, {"x": x})["y"].reshape(images, 5, 400)
    columns = weight_inputs(model.graph[0], x, np.random.default_rng(7))
    most = min(POSITIONS, 1024 // images)
    picked = np.random.default_rng(7).choice(400, most, replace=False, shuffle=False)
    assert columns.shape == (1, 27, images * most)
    product = (weight.reshape(5, 27) @ columns[0]).reshape(5, images, most).transpose(1, 0, 2)
    np.testing.assert_allclose(product, y[:, :, picked], atol=1e-5)


@pytest.mark.parametrize("op, shape", [("MatMul", (6, 5)), ("Gemm", (6, 5)), ("Gemm <transB = 1>", (5, 6))])
def test_matrix_weights_go_to_groups_and_back(op: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, weight = f32(rng.normal(size=(4, 6))), f32(rng.normal(size=shape))
    model = parse(f"net (float[4, 6] x) => (float[4, 5] y) {{ y = {op} (x, w) }}", weights={"w": weight})
    node = model.graph[0]
    product = to_groups(node, weight)[0] @ weight_inputs(node, x, rng)[0]
    np.testing.assert_allclose(product.T, run(model, {"x": x})["y"], atol=1e-5)
    np.testing.assert_array_equal(from_groups(node, to_groups(node, weight)), weight)


def test_convolution_weights_go_to_groups_and_back() -> None:
    weight = f32(np.arange(4 * 3 * 2 * 2).reshape(4, 3, 2, 2))
    node = conv("1, 6, 5, 5", weight, "group = 2").graph[0]
    assert to_groups(node, weight).shape == (2, 2, 12)
    np.testing.assert_array_equal(from_groups(node, to_groups(node, weight)), weight)


@pytest.mark.parametrize("groups, columns", [(1, 40), (3, 7), (20, 2)])
def test_moments_are_averages_with_any_buffering(groups: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    parts = [f32(rng.normal(size=(groups, columns, n))) for n in (3, 0, 11, 1, 64, 5)]
    moments = InputMoments(
        np.zeros((groups, columns), np.float32), np.zeros((groups, columns, columns), np.float32)
    )
    for part in parts:
        moments.add(part)
    moments.finish()
    whole = np.concatenate(parts, axis=2).astype(np.float64)
    assert moments.count == 84
    assert moments.second is not None
    np.testing.assert_allclose(moments.mean, whole.mean(2), atol=1e-6)
    np.testing.assert_allclose(moments.second, whole @ whole.transpose(0, 2, 1) / 84, atol=1e-5)


def correlated(columns: int, count: int, rng: np.random.Generator) -> Floats:
    """Correlated inputs ``[K, count]`` with nonzero means."""
    causes = rng.normal(size=(max(columns // 4, 1), count))
    mixed = rng.normal(size=(columns, len(causes))) @ causes
    return f32(mixed + 0.1 * rng.normal(size=(columns, count)) + rng.normal(size=(columns, 1)))


def problem(groups: int, outputs: int, columns: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """Weight, second moments, scale at 4 bits, where rounding matters."""
    rng = np.random.default_rng(seed)
    weight = f32(rng.normal(size=(groups, outputs, columns)))
    x = np.stack([correlated(columns, 200, rng) for _ in range(groups)])
    return weight, f32(x @ x.transpose(0, 2, 1) / 200), f32(np.abs(weight).max(2, keepdims=True) / 7)


@given(
    groups=st.integers(1, 3), outputs=st.integers(1, 4), columns=st.integers(1, 140), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_never_worse_than_nearest_and_inside_the_limit(
    groups: int, outputs: int, columns: int, seed: int
) -> None:
    weight, second, scale = problem(groups, outputs, columns, seed)
    kept = weight.copy()
    integers = round_gptq(weight, second, scale, 7)
    nearest = np.clip(np.rint(weight / scale), -7, 7)
    np.testing.assert_array_equal(weight, kept)
    assert integers.shape == weight.shape
    assert np.abs(integers).max() <= 7
    np.testing.assert_array_equal(integers, np.rint(integers))
    found, plain = (output_error(weight, q * scale, second) for q in (integers, nearest))
    assert (found <= plain).all()


def test_clearly_better_than_nearest_where_inputs_are_correlated() -> None:
    weight, second, scale = problem(1, 16, 150, 0)
    integers = round_gptq(weight, second, scale, 7)
    found = output_error(weight, integers * scale, second).sum()
    plain = output_error(weight, np.rint(weight / scale) * scale, second).sum()
    assert found < 0.5 * plain


@given(columns=st.integers(1, 90), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_is_nearest_where_inputs_are_independent(columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = f32(rng.normal(size=(2, 3, columns)))
    second = np.stack([np.diag(f32(rng.uniform(0, 5, columns))) for _ in range(2)])
    scale = f32(np.abs(weight).max(2, keepdims=True) / 7)
    np.testing.assert_array_equal(
        round_gptq(weight, second, scale, 7), np.clip(np.rint(weight / scale), -7, 7)
    )


def test_groups_are_rounded_independently() -> None:
    weight, second, scale = problem(3, 4, 70, 1)
    together = round_gptq(weight, second, scale, 7)
    alone = [round_gptq(weight[[g]], second[[g]], scale[[g]], 7)[0] for g in range(3)]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_follows_the_method_column_by_column() -> None:
    """The plain algorithm in double precision, with a new inverse for the columns left at each step."""
    weight, second, scale = problem(1, 5, 100, 2)
    left = weight[0].astype(np.float64)
    damped = second[0] + np.eye(100) * 0.01 * np.trace(second[0]) / 100
    expected = np.zeros_like(left)
    still = np.argsort(-np.diag(second[0]), kind="stable")
    while len(still):
        inverse = np.linalg.inv(damped[np.ix_(still, still)])
        i = still[0]
        expected[:, i] = np.clip(np.rint(left[:, i] / scale[0, :, 0]), -7, 7)
        error = left[:, i] - expected[:, i] * scale[0, :, 0]
        left[:, still] -= np.outer(error / inverse[0, 0], inverse[0])
        still = still[1:]
    found = round_gptq(weight, second, scale, 7)[0]
    # Single precision may round a column differently now and then; later columns compensate.
    errors = [output_error(weight, f32(q)[None] * scale, second).sum() for q in (found, expected)]
    assert (found == expected).mean() > 0.9
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@pytest.mark.parametrize("dead", ["some", "all"])
def test_inputs_that_are_always_zero(dead: str) -> None:
    weight, second, scale = problem(2, 3, 20, 3)
    keep = f32(np.arange(20) >= (20 if dead == "all" else 8))
    integers = round_gptq(weight, second * keep[:, None] * keep, scale, 7)
    quiet = keep == 0
    np.testing.assert_array_equal(integers[:, :, quiet], np.clip(np.rint(weight / scale), -7, 7)[:, :, quiet])


def prepared(
    folder: Path, raw: ir.Model, x: Array, *, reduce_range: bool = False
) -> tuple[ir.Model, QuantPlan, Samples]:
    """The normalized model, a static plan of it, and the samples ``x`` [samples, ...]."""
    model, _ = normalize(raw, min_opset=13, max_opset=23)
    folder.mkdir(exist_ok=True)
    np.savez(folder / "x.npz", x=x)
    samples = open_samples(
        Data(path=str(folder / "x.npz")), "calibration", input_specs(model), {}, base=folder
    )
    for number, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{number}"  # as normalize leaves every node
    target = load_target("x86-cpu")
    quantization = target.quantization.model_copy(update={"reduce_range": reduce_range})
    target = target.model_copy(update={"quantization": quantization})
    groups = find_fusion_groups(model, target.kernels)
    table = calibrate(model, samples, tensors_to_observe(groups), Calibration(observer="minmax"), threads=1)
    methods = {u.name: Request(Precision.STATIC) for u in groups}
    return model, make_plan(model, groups, table.ranges, target, methods), samples


def rounder_of(model: ir.Model, plan: QuantPlan, samples: Samples, *, gptq: bool) -> Rounder:
    return round_weights(model, plan, samples, gptq=gptq, threads=1, seed=0)


MODELS = {
    "Conv": ("y = Conv <pads = [1, 1, 1, 1]> (x, w, b)", (8, 6, 3, 3)),
    "Conv without bias": ("y = Conv (x, w)", (8, 6, 3, 3)),
    "depthwise": ("y = Conv <group = 6> (x, w, b)", (6, 1, 3, 3)),
}


@pytest.mark.parametrize("gptq", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_the_mean_error_of_the_output_is_taken_out(tmp_path: Path, kind: str, gptq: bool) -> None:
    body, shape = MODELS[kind]
    rng = np.random.default_rng(0)
    weights = {"w": f32(rng.normal(size=shape)), "b": f32(rng.normal(size=shape[0]))}
    if "b)" not in body:
        del weights["b"]
    model = parse(f"net (float[1, 6, 8, 8] x) => (float[1, C, H, W] y) {{ {body} }}", weights=weights)
    x = f32(rng.normal(size=(5, 1, 6, 8, 8)) + 2)  # 64 positions or fewer: all are sampled
    model, plan, samples = prepared(tmp_path, model, x)
    rounder = rounder_of(model, plan, samples, gptq=gptq)
    (group,) = (u for u in plan.groups if u.weight is not None)
    assert group.weight is not None
    rounded = rounder(plan)[group.group.name]
    assert rounded.bias is not None
    stored = {"w": dequantize(rounded.integers, group.weight), "b": rounded.bias}
    with_bias = body if "b)" in body else body.replace("w)", "w, b)")
    integer = parse(f"net (float[1, 6, 8, 8] x) => (float[1, C, H, W] y) {{ {with_bias} }}", weights=stored)
    errors = np.stack([run(integer, {"x": s})["y"] - run(model, {"x": s})["y"] for s in x])
    channels = np.abs(errors.mean(axis=(0, 1, 3, 4)))
    assert channels.max() < 1e-4
    assert errors.std() > 1e-3  # the rest of the error is still there


def test_gptq_lowers_the_error_of_real_outputs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mixing, weight = f32(rng.normal(size=(8, 48))), f32(rng.normal(size=(48, 24)))
    model = parse(
        "net (float[1, 9, 48] x) => (float[1, 9, 24] y) { y = MatMul (x, w) }", weights={"w": weight}
    )
    x = f32(rng.normal(size=(40, 1, 9, 8)) @ mixing + 0.05 * rng.normal(size=(40, 1, 9, 48)))
    model, plan, samples = prepared(tmp_path, model, x[:20])
    (group,) = (u for u in plan.groups if u.weight is not None)
    assert group.weight is not None

    def error(rounder: Rounder) -> float:
        stored = dequantize(rounder(plan)[group.group.name].integers, group.weight)  # type: ignore[arg-type]
        return float(((x[20:] @ (stored - weight)) ** 2).mean())

    assert error(rounder_of(model, plan, samples, gptq=True)) < 0.3 * error(Rounder(model))
    assert rounder_of(model, plan, samples, gptq=False).rounded == {}


@pytest.mark.parametrize("reduce_range, limit", [(False, 127), (True, 63)])
@pytest.mark.parametrize("gptq", [False, True])
def test_integers_use_the_targets_range_and_no_more(
    tmp_path: Path, reduce_range: bool, limit: int, gptq: bool
) -> None:
    rng = np.random.default_rng(0)
    weight, x = f32(rng.normal(size=(32, 16))), f32(correlated(32, 100, rng).T.reshape(20, 5, 32))
    model = parse("net (float[5, 32] x) => (float[5, 16] y) { y = MatMul (x, w) }", weights={"w": weight})
    model, plan, samples = prepared(tmp_path, model, x, reduce_range=reduce_range)
    rounder = rounder_of(model, plan, samples, gptq=gptq)
    assert bool(rounder.rounded) == gptq
    (rounded,) = rounder(plan).values()
    assert rounded.integers.dtype == np.int8
    assert np.abs(rounded.integers.astype(int)).max() == limit


def test_weights_of_other_parameters_are_rounded_to_nearest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = f32(rng.normal(size=(6, 4)))
    model = parse("net (float[2, 6] x) => (float[2, 4] y) { y = MatMul (x, w) }", weights={"w": weight})
    model, plan, samples = prepared(tmp_path, model, f32(rng.normal(size=(4, 2, 6))))
    rounder = rounder_of(model, plan, samples, gptq=True)
    (group,) = (u for u in plan.groups if u.weight is not None)
    assert group.weight is not None
    assert next(iter(rounder.rounded))[0] == group.group.name
    other = choose_weight_params(weight * 2, WEIGHTS, 1)
    changed = QuantPlan(
        tuple(type(u)(u.group, u.precision, u.reason, other) if u is group else u for u in plan.groups),
        plan.activations,
        plan.activation_scheme,
        plan.weight_scheme,
    )
    integers = rounder(changed)[group.group.name].integers
    np.testing.assert_array_equal(integers, np.rint(weight / other.scale))


NET = """net (float[1, 4, 6, 6] x) => (float[1, 8, 6, 6] y) {
    a = Conv <kernel_shape = [1, 1]> (x, w0)
    b = Relu (a)
    c = Conv <group = 8, pads = [1, 1, 1, 1]> (b, w1)
    y = Conv (c, w2)
}"""


def three_layers() -> ir.Model:
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 4, 1, 1), "w1": (8, 1, 3, 3), "w2": (8, 8, 1, 1)}
    model = parse(NET, weights={name: f32(rng.normal(size=shape)) for name, shape in shapes.items()})
    return normalize(model, min_opset=13, max_opset=23)[0]


def moments_of(model: ir.Model, plan: QuantPlan, samples: Samples) -> dict[str, InputMoments]:
    groups = [u.group for u in plan.groups if u.weight is not None]
    streamed = stream_moments(model, groups, samples, with_second_moments=True, threads=1, seed=0)
    return {group.name: moments for group, moments in streamed}


def test_passes_over_the_samples_as_memory_allows_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = three_layers()
    model, plan, samples = prepared(
        tmp_path, model, f32(np.random.default_rng(1).normal(size=(3, 1, 4, 6, 6)))
    )
    at_once = moments_of(model, plan, samples)
    monkeypatch.setattr(moments_module, "MAX_BYTES", 1)
    passes: list[list[str]] = []
    plain = stream_activations

    def counted(*args: object, **kwargs: object) -> object:
        passes.append(list(args[2]))  # type: ignore[call-overload]
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(moments_module, "stream_activations", counted)
    one_by_one = moments_of(model, plan, samples)
    assert passes == [["x"], ["b"], ["c"]]
    assert list(one_by_one) == list(at_once)
    for name, moments in at_once.items():
        np.testing.assert_allclose(one_by_one[name].mean, moments.mean, atol=1e-6)
        np.testing.assert_allclose(one_by_one[name].second, moments.second, atol=1e-5)  # type: ignore[arg-type]


def test_wide_weights_get_means_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = three_layers()
    model, plan, samples = prepared(
        tmp_path, model, f32(np.random.default_rng(1).normal(size=(3, 1, 4, 6, 6)))
    )
    monkeypatch.setattr(moments_module, "MAX_COLUMNS", 8)
    has_second = [m.second is not None for m in moments_of(model, plan, samples).values()]
    assert has_second == [True, False, True]
    rounder = rounder_of(model, plan, samples, gptq=True)
    assert (len(rounder.rounded), len(rounder.means)) == (2, 3)


def test_the_same_seed_gives_the_same_integers(tmp_path: Path) -> None:
    model = three_layers()
    model, plan, samples = prepared(
        tmp_path, model, f32(np.random.default_rng(1).normal(size=(3, 1, 4, 6, 6)))
    )
    first, second = (rounder_of(model, plan, samples, gptq=True)(plan) for _ in range(2))
    for name, rounded in first.items():
        np.testing.assert_array_equal(rounded.integers, second[name].integers)
        np.testing.assert_array_equal(rounded.bias, second[name].bias)
