"""Structured pruning: how many channels go, which, and what the rest makes of it."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from support.onnx_models import Array, f32, parse, run
from support.quantizing import weight

from edgepack.benchmark.bench import ColdStart
from edgepack.compression.eliminate import Consumer, eliminate, order_of, salience_of
from edgepack.compression.structured import Multiples, SlimReport, prune_structured, structured_notes
from edgepack.config.passes import Structured
from edgepack.config.recipe import Data, Recipe, load_recipe
from edgepack.config.strict_yaml import parse as parse_settings
from edgepack.config.target import load_target
from edgepack.data.samples import Samples, open_samples
from edgepack.errors import ConfigError
from edgepack.graph.normalize import normalize
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.inputs import input_specs
from edgepack.ir.numerics import sqnr_db
from edgepack.pipeline.build import build
from edgepack.pipeline.job import Job

NET = """net (float[1, 6, 10, 10] x) => (float[1, 5] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
    r = Relu (a)
    d = Conv <group = 32> (r, w1)
    s = Relu (d)
    e = Conv (s, w2, b2)
    h = Relu (e)
    g = GlobalAveragePool (h)
    f = Flatten (g)
    y = Gemm (f, w3, b3)
}"""
WEIGHTS = {
    "w0": weight(32, 6, 3, 3), "b0": weight(32, seed=1), "w1": weight(32, 1, 3, 3, seed=2),
    "w2": weight(24, 32, 1, 1, seed=3), "b2": weight(24, seed=4), "w3": weight(24, 5, seed=5),
    "b3": weight(5, seed=6),
}  # fmt: skip
INPUTS = np.random.default_rng(3).normal(size=(48, 1, 6, 10, 10)).astype(np.float32)


def net() -> ir.Model:
    return normalize(parse(NET, weights=WEIGHTS), min_opset=13, max_opset=21)[0]


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    np.savez(tmp_path / "x.npz", x=INPUTS[:40])
    return open_samples(
        Data(path=str(tmp_path / "x.npz")), "calibration", input_specs(net()), {}, base=tmp_path
    )


def pruned(
    samples: Samples, dense: int = 1, depthwise: int = 1, **keys: object
) -> tuple[ir.Model, SlimReport]:
    config = parse_settings(Structured, keys, "structured")
    return prune_structured(net(), samples, config, Multiples(dense, depthwise), threads=1, seed=0)


def outputs(model: ir.Model) -> Array:
    return np.concatenate([run(model, {"x": x})["y"] for x in INPUTS[40:]])


def left(report: SlimReport) -> list[tuple[int, int]]:
    return [(group.channels, group.left) for group in report.groups]


@pytest.mark.parametrize("method", ["l1", "l2", "activation", "second_order"])
@pytest.mark.parametrize("macs", [0.3, 0.7, 0.9])
def test_multiplications_come_down_to_the_target(samples: Samples, method: str, macs: float) -> None:
    model, report = pruned(samples, method=method, macs=macs, reconstruct=False)
    positions = {"Conv_w0": 100 * 54, "w1": 64 * 9, "w2": 64, "w3": 1}
    assert report.macs_before == 32 * positions["Conv_w0"] + 32 * 64 * 9 + 24 * 32 * 64 + 24 * 5
    (_, a), (_, b), (_, c) = left(report)
    assert report.macs_after == a * 100 * 54 + a * 64 * 9 + a * b * 64 + b * 5 and c == 5
    assert macs - 0.05 < report.macs_after / report.macs_before <= macs
    assert outputs(model).shape == (8, 5)


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 24), st.integers(1, 6), st.sampled_from([1, 3]), st.integers(0, 9))
def test_the_first_to_go_costs_what_least_squares_says(classes: int, outs: int, taps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = classes * taps
    x = rng.normal(size=(size, 3)) @ rng.normal(size=(3, 4 * size)) + rng.normal(size=(size, 4 * size))
    second, matrix = x @ x.T / x.shape[1], rng.normal(size=(outs, size))
    owner = np.repeat(np.arange(classes), taps)
    order, losses = eliminate([Consumer(f32(matrix), f32(second), owner)], classes)
    assert sorted(order.tolist()) == list(range(classes))
    assert (np.diff(losses) >= 0).all() and losses[0] == 0

    damped = second + 0.01 * np.trace(second) / size * np.eye(size)

    def lost(one: int) -> float:
        rest = owner != one
        fit = np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest] @ matrix.T).T
        error = matrix.copy()
        error[:, rest] -= fit
        return float(np.trace(error @ damped @ error.T) / np.trace(matrix @ second @ matrix.T))

    all_losses = [lost(one) for one in range(classes)]
    assert losses[1] == pytest.approx(min(all_losses), rel=1e-2)
    assert all_losses[order[0]] == pytest.approx(min(all_losses), rel=1e-2)


def test_readers_that_do_not_look_cost_nothing() -> None:
    matrix = f32([[1.0, 0.0, 2.0]])
    consumer = Consumer(matrix, f32(np.eye(3)), np.asarray([0, 1, -1]))
    assert salience_of([consumer], 2).tolist() == pytest.approx([0.2, 0.0])
    order, losses = order_of(salience_of([consumer], 2))
    assert order.tolist() == [1, 0] and losses.tolist() == pytest.approx([0, 0, 0.2])
    assert eliminate([consumer], 2)[0].tolist() == [1, 0]


def test_the_refit_makes_up_for_what_has_gone(samples: Samples) -> None:
    model, whole = net(), outputs(net())
    before = fingerprint(model)
    cut, report = pruned(samples, macs=0.6, reconstruct=False)
    fitted, second = pruned(samples, macs=0.6)
    assert left(report) == left(second) and (report.fitted, second.fitted) == (0, 2)
    alone, with_fit = sqnr_db(whole, outputs(cut)), sqnr_db(whole, outputs(fitted))
    assert with_fit > alone + 6 and with_fit > 10
    assert fingerprint(model) == before


def test_what_loses_least_goes_first(samples: Samples) -> None:
    """Channels that are nearly copies of others may go, whatever their size."""
    weights = dict(WEIGHTS)
    for name in ("w0", "b0", "w1"):
        weights[name] = np.concatenate([WEIGHTS[name][:16]] * 2)
    model = normalize(parse(NET, weights=weights), min_opset=13, max_opset=21)[0]
    config = Structured(macs=0.53, keep=(next(n.name or "" for n in model.graph if n.op_type == "Gemm"),))
    slim, report = prune_structured(model, samples, config, Multiples(), threads=1, seed=0)
    assert report.groups[0].left in (16, 17)
    assert sqnr_db(outputs(model), outputs(slim)) > 20


def test_multiples_that_kernels_like(samples: Samples) -> None:
    _, report = pruned(samples, macs=0.6, dense=5, depthwise=16, reconstruct=False)
    assert report.groups[0].left == 16 and report.groups[1].left % 5 in (0, 4)
    _, report = pruned(samples, macs=0.4, dense=5, depthwise=16, reconstruct=False)
    assert report.groups[0].left == 16, "no multiple is below"
    _, report = pruned(samples, macs=0.5, depthwise=16, multiple=7, reconstruct=False)
    assert report.groups[0].left % 7 == 0


def test_no_more_than_a_share_of_a_layer(samples: Samples) -> None:
    _, report = pruned(samples, macs=0.05, at_most=0.5, reconstruct=False)
    assert left(report) == [(32, 16), (24, 12), (5, 5)]
    assert "no more channels can be pruned" in structured_notes(report, Structured(macs=0.05))[1]
    notes = structured_notes(report, Structured(macs=0.9))
    assert notes[0].startswith("28 of 61 channels removed from 2 groups,")
    assert notes[1] == "1 groups not pruned: 'y' is an output of the model"


def test_kept_layers_and_names_that_are_none(samples: Samples) -> None:
    names = [n.name or "" for n in net().graph if n.op_type == "Conv"]
    _, report = pruned(samples, macs=0.8, keep=[names[0]], reconstruct=False)
    assert report.groups[0].left == 32 and "is excluded by `keep`" in report.groups[0].reason
    with pytest.raises(
        ConfigError, match="structured: keep: no node that produces channels is named 'nobody'"
    ):
        pruned(samples, keep=["nobody"])
    with pytest.raises(ConfigError, match="structured: keep_types: the model has no 'conv', did you mean"):
        pruned(samples, keep_types=["conv"])
    with pytest.raises(ConfigError, match=r"no channel of the model can be pruned: .* is excluded by `keep`"):
        pruned(samples, keep_types=["Conv"])
    with pytest.raises(ConfigError, match=r"no channel of the model can be pruned: .* is excluded by `keep`"):
        pruned(samples, keep=["*"])


def test_a_build_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))
    folder = tiny.project(tmp_path / "p", passes=[{"structured": {"macs": 0.6, "multiple": 1}}])
    report, output = build(
        Job(load_recipe(folder / "edgepack.yaml", {}), load_target("x86-cpu"), folder, "edgepack build")
    )
    original, slim, quantized = report.waterfall
    assert [s.name for s in (original, slim, quantized)] == ["original", "structured", "quantized"]
    assert slim.raw_bytes < 0.8 * original.raw_bytes and "channels removed" in slim.notes[0]
    assert slim.sqnr_db is not None and slim.sqnr_db > 3
    assert (output / "model.onnx").stat().st_size == quantized.raw_bytes


def test_order_of_passes() -> None:
    def recipe(*passes: str) -> Recipe:
        return parse_settings(Recipe, {"model": "m.onnx", "passes": list(passes)}, "recipe")

    assert len(recipe("structured", "prune", "cluster").passes) == 3
    for first in ("prune", "cluster"):
        with pytest.raises(ConfigError, match=f"structured after {first}: .* put structured first"):
            recipe(first, "structured")
