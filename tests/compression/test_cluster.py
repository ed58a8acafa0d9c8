"""Clustering: few values for many weights, chosen well, and the same values in every int8 file."""

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from support.onnx_models import Array, f32, run
from support.pruning import moments, pruned
from support.quantizing import weight

from edgepack.benchmark.bench import ColdStart
from edgepack.compression.cluster import cluster
from edgepack.compression.codebook import best_codes, codebooks, fitted_scale, nearest_code
from edgepack.compression.codebook import cluster as cluster_matrix
from edgepack.config.passes import Cluster
from edgepack.config.recipe import load_recipe
from edgepack.config.target import load_target
from edgepack.ir.files import load_model
from edgepack.ir.numerics import sqnr_db
from edgepack.pipeline.build import build
from edgepack.pipeline.job import Job
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.weights.codebook_scales import codebook_scales_of
from edgepack.quantization.weights.gptq import output_error


def cost(x: Array, importance: Array, codes: Array) -> float:
    return float((importance * (x[..., None] - codes).__abs__().min(-1) ** 2).sum())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(0, 1000), st.integers(4, 9))
def test_codes_are_the_best_there_are(values: int, seed: int, count: int) -> None:
    """On values that are integers themselves, where one cell holds one value, against all choices."""
    rng = np.random.default_rng(seed)
    x = rng.choice(np.arange(1, 12), count).astype(np.float32)
    importance = f32(rng.uniform(0.1, 3, count))
    codes = best_codes(x[None], importance[None], values)
    assert len(codes) <= values
    every = itertools.combinations(range(12), min(values, 12))
    least = min(cost(x, importance, np.array(chosen)) for chosen in every)
    assert cost(x, importance, codes) == pytest.approx(least, abs=1e-3)


def test_zero_is_a_value_where_there_are_zeros() -> None:
    x = f32([[0.0, 0.0, 50.0, 52.0, -90.0, 100.0]])
    assert best_codes(x, np.ones_like(x), 4).tolist() == [-90, 0, 51, 100]
    assert 0 not in best_codes(x[:, 2:], np.ones_like(x[:, 2:]), 4)
    assert best_codes(np.zeros_like(x), np.ones_like(x), 4).tolist() == [0]


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 70), st.integers(1, 9), st.integers(1, 5), st.integers(0, 5), st.booleans())
def test_few_values_zeros_stay_and_the_rest_makes_up(
    columns: int, outputs: int, bits: int, seed: int, dense: bool
) -> None:
    matrix, second = weight(1, outputs, columns, seed=seed), moments(columns, seed)
    if not dense:
        matrix = np.where(np.abs(matrix) < np.quantile(np.abs(matrix), 0.4), np.float32(0), matrix)
    codes, scale = cluster_matrix(matrix, second, 2**bits, None)
    assert len(np.unique(codes)) <= 2**bits
    assert (codes[matrix == 0] == 0).all()
    assert np.abs(codes).max() <= 127 and (codes == np.rint(codes)).all() and (scale > 0).all()
    plain, plain_scale = cluster_matrix(matrix, None, 2**bits, None)
    ours, theirs = (
        output_error(matrix, f32(c * s), second).sum() for c, s in ((codes, scale), (plain, plain_scale))
    )
    importance = f32(np.einsum("gkk->gk", second)[:, None] * plain_scale**2)
    books = codebooks(f32(matrix / plain_scale), importance, 2**bits, None)
    rows = (matrix / plain_scale).transpose(2, 0, 1)
    nearest = np.where(matrix == 0, 0, np.stack([nearest_code(row, books) for row in rows], axis=-1))
    assert ours <= output_error(matrix, f32(nearest * plain_scale), second).sum() * (1 + 1e-4)
    assert theirs > 0 or ours == 0


def test_outputs_may_have_values_of_their_own() -> None:
    matrix, second = weight(1, 8, 40), f32(np.eye(40))[None]
    codes, _ = cluster_matrix(matrix, second, 4, 2)
    assert all(len(np.unique(codes[0, i : i + 2])) <= 4 for i in range(0, 8, 2))
    assert len(np.unique(codes)) > 4
    shared, scale = cluster_matrix(matrix, second, 4, None)
    own, own_scale = cluster_matrix(matrix, second, 4, 1)
    assert (
        output_error(matrix, own * own_scale, second).sum()
        < output_error(matrix, shared * scale, second).sum()
    )


def test_fitted_scales_lose_less() -> None:
    matrix, second = weight(2, 5, 30), np.concatenate([moments(30), moments(30, 1)])
    scale = np.abs(matrix).max(axis=2, keepdims=True) / np.float32(3)
    codes = f32(np.rint(matrix / scale))
    fitted = fitted_scale(matrix, codes, second, scale)
    before, after = (output_error(matrix, f32(codes * s), second) for s in (scale, fitted))
    assert (after <= before * (1 + 1e-4)).all() and after.sum() < before.sum()


def test_a_model_of_all_kinds_after_pruning(tmp_path: Path) -> None:
    original, sparse, _ = pruned(tmp_path, sparsity=0.4)
    groups = find_fusion_groups(sparse, load_target("x86-cpu").kernels)
    from support.pruning import data

    clustered, rows = cluster(sparse, groups, data(tmp_path), Cluster(bits=4), threads=1, seed=0)
    assert len(rows) == 3 and max(r.codes for r in rows) <= 16
    x = {"x": weight(1, 6, 10, 10, seed=30)}
    assert sqnr_db(run(sparse, x)["y"], run(clustered, x)["y"]) > 10
    before, after = ({n.name: n for n in m.graph} for m in (sparse, clustered))
    for row in rows:
        old, new = (m[row.group].inputs[1].const_value.numpy() for m in (before, after))  # type: ignore[union-attr]
        assert (new[old == 0] == 0).all()
        assert (
            codebook_scales_of(after[row.group]) is not None and codebook_scales_of(before[row.group]) is None
        )
    assert all(v.const_value is not None and v.uses() for v in clustered.graph.initializers.values())
    assert "w0" in original.graph.initializers


def integers_of(model: ir.Model) -> list[Array]:
    tensors = [v.const_value for v in model.graph.initializers.values()]
    return [t.numpy() for t in tensors if t is not None and t.dtype == ir.DataType.INT8 and len(t.shape) == 2]


@pytest.mark.parametrize("method", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_int8_keeps_the_values(
    method: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))
    passes = [{"prune": {"sparsity": 0.3}}, {"cluster": {"bits": 3}}]
    folder = tiny.project(tmp_path / "p", passes=passes, preset=preset, quantize={"method": method})
    recipe = load_recipe(folder / "edgepack.yaml", {})
    report, output = build(Job(recipe, load_target("x86-cpu"), folder, "edgepack build"))
    assert [s.name for s in report.waterfall] == ["original", "prune", "cluster", "quantized"]
    stored = integers_of(load_model(output / "model.onnx"))
    assert len(stored) == 2
    for integers in stored:
        assert len(np.unique(integers)) <= 8
        assert (integers == 0).mean() > 0.1
    clustered, quantized = report.waterfall[2:]
    assert clustered.sqnr_db is not None and quantized.sqnr_db is not None
    assert quantized.sqnr_db > clustered.sqnr_db - 1.5


def test_every_format_keeps_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))
    folder = tiny.project(tmp_path / "p", passes=[{"cluster": {"bits": 2}}])
    recipe = load_recipe(folder / "edgepack.yaml", {})
    _, output = build(Job(recipe, load_target("mobile"), folder, "edgepack build"))
    interpreter = litert.Interpreter(str(output / "model.tflite"))
    interpreter.allocate_tensors()
    details = interpreter.get_tensor_details()
    matrices = [d for d in details if d["dtype"] is np.int8 and np.prod(d["shape"]) in (24 * 16, 4 * 24)]
    assert len(matrices) == 2
    for detail in matrices:
        assert len(np.unique(interpreter.get_tensor(detail["index"]))) <= 4
