"""Effective ranges: functions that consume a value, and ranges with the least error at their outputs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.observing import bounds, measured
from support.onnx_models import Array, f32, parse, run

from edgepack.calibration.effective_range import UNARY, Function, consumer_functions
from edgepack.calibration.observers import OBSERVERS
from edgepack.calibration.run import calibrate
from edgepack.config.recipe import Calibration, Data
from edgepack.data.samples import open_samples
from edgepack.ir.inputs import input_specs

ATTRIBUTES = {
    "HardSigmoid": "<alpha = 0.3, beta = 0.4>",
    "LeakyRelu": "<alpha = 0.2>",
    "Elu": "<alpha = 0.7>",
}
EXTRA = {"Clip": ", low, high"}


def value_in(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def consumed_by(
    *nodes: str, outputs: str = "float[N] y", constants: dict[str, Array] | None = None
) -> ir.Model:
    body = f"net (float[N] x) => ({outputs}) {{ h = Neg (x) {' '.join(nodes)} }}"
    return parse(body, weights=constants)


@pytest.mark.parametrize("op", UNARY)
def test_each_function_is_that_of_the_operator(op: str) -> None:
    node = f"y = {op} {ATTRIBUTES.get(op, '')} (h{EXTRA.get(op, '')})"
    model = consumed_by(node, constants={"low": f32(-1.5), "high": f32(2)} if op == "Clip" else None)
    x = np.linspace(-12, 12, 101, dtype=np.float32)
    (function,) = consumer_functions(value_in(model, "h"))
    np.testing.assert_allclose(function((-x).astype(np.float64)), run(model, {"x": x})["y"], atol=2e-6)


def test_a_gate_and_its_mul_are_one_function() -> None:
    model = consumed_by("s = Sigmoid (h)", "y = Mul (h, s)")
    (function,) = consumer_functions(value_in(model, "h"))
    x = np.linspace(-12, 12, 101)
    np.testing.assert_allclose(function(x), x / (1 + np.exp(-x)), atol=1e-12)


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        (["y = Relu (h)", "z = Add (h, h)"], "float[N] y, float[N] z"),
        (["y = Relu (h)"], "float[N] y, float[N] h"),
        (["s = Sigmoid (h)", "y = Mul (h, h)"], "float[N] y, float[N] s"),
        (["y = Clip (h, x)"], "float[N] y"),
        (["s = Sigmoid (h)", "y = Mul (h, s)", "z = Relu (s)"], "float[N] y, float[N] z"),
        (["s = Sigmoid (h)", "y = Mul (h, s)"], "float[N] y, float[N] s"),
    ],
    ids=[
        "another consumer",
        "an output",
        "its square",
        "bounds of the run",
        "a shared gate",
        "a gate that is an output",
    ],
)
def test_values_with_a_consumer_that_is_not_unary(nodes: list[str], outputs: str) -> None:
    assert consumer_functions(value_in(consumed_by(*nodes, outputs=outputs), "h")) == ()


def swish(x: Array) -> Array:
    return np.asarray(x * np.clip(x / 6 + 0.5, 0, 1))


@given(spread=st.floats(4, 40), seed=st.integers(0, 99))
def test_the_effective_range_never_has_a_larger_error(spread: float, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal(3000) * spread).astype(np.float32)
    stats = measured(x)
    plain = OBSERVERS["mse"](stats, Calibration(), 255)
    stats.consumer_functions = (swish,)
    aware = OBSERVERS["mse"](stats, Calibration(), 255)

    def error(low: float, high: float, f: Function | Callable[[Array], Array]) -> float:
        step = (high - low) / 255
        q = np.clip(np.rint(x / step), np.rint(low / step), 255 + np.rint(low / step)) * step
        return float(((f(q) - f(x.astype(np.float64))) ** 2).sum())

    assert error(*aware, swish) <= error(*plain, swish) * 1.05


def test_no_integers_for_what_hard_swish_maps_to_zero(tmp_path: Path) -> None:
    model = parse(
        "net (float[N, 64] x) => (float[N, 64] y) { h = Mul (x, k) y = HardSwish (h) }",
        weights={"k": f32(10)},
    )
    rng = np.random.default_rng(0)
    for i in range(8):
        np.savez(tmp_path / f"{i}.npz", x=rng.standard_normal((1, 64), dtype=np.float32))
    samples = open_samples(Data(path=str(tmp_path)), "calibration", input_specs(model), {}, base=tmp_path)
    table = calibrate(model, samples, ["h"], Calibration(), threads=1)
    assert table.ranges["h"].minimum < -20
    assert -3.6 < table.ranges["h"].low <= -2.8
    x = rng.standard_normal(5000).astype(np.float32) * 10
    assert bounds("mse", x)[0] < -15
