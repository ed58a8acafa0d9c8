"""Pruning: where zeros go, what the rest does about them, and what the model loses."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.onnx_models import f32, run
from support.pruning import WEIGHTS, moments, pruned
from support.quantizing import weight

from edgepack.compression.sparse import (
    FIT_DAMPING,
    Pattern,
    damped,
    lowest_in_rows,
    prune_obs,
    rates,
    salience,
)
from edgepack.config.passes import Prune
from edgepack.errors import ConfigError
from edgepack.ir.numerics import sqnr_db
from edgepack.quantization.weights.gptq import output_error, round_gptq


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 70), st.integers(1, 9), st.floats(0.05, 0.95), st.integers(0, 5))
@example(14, 1, 0.0625, 0)
def test_zeros_are_as_many_as_asked_for_and_the_rest_makes_up_for_them(
    columns: int, outputs: int, sparsity: float, seed: int
) -> None:
    matrix, second = weight(1, outputs, columns, seed=seed), moments(columns, seed)
    with pytest.MonkeyPatch.context() as patch:
        # A damped fit generalizes better and may lose a little on the samples of the fit.
        patch.setattr("edgepack.compression.sparse.FIT_DAMPING", 0.0)
        sparse = prune_obs(matrix, second, sparsity, Pattern())
    assert abs((sparse == 0).sum() - sparsity * matrix.size) <= -(-columns // 64)
    magnitude = np.where(np.abs(matrix) < np.quantile(np.abs(matrix), sparsity), 0, matrix)
    ours, theirs = (output_error(matrix, m, second).sum() for m in (sparse, magnitude))
    if (sparse == 0).sum() <= (magnitude == 0).sum():
        assert ours <= theirs * (1 + 1e-4)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 40), st.integers(1, 6), st.floats(0.1, 0.8), st.integers(0, 5))
def test_what_is_left_is_fitted(columns: int, outputs: int, sparsity: float, seed: int) -> None:
    """Each output's error is that of damped least squares over its own weights, to a few percent."""
    matrix, second = weight(1, outputs, columns, seed=seed), moments(columns, seed)
    sparse = prune_obs(matrix, second, sparsity, Pattern())
    second = damped(second, FIT_DAMPING)
    errors = output_error(matrix, sparse, second)[0]
    for row, kept, error in zip(matrix[0], sparse[0] != 0, errors, strict=True):
        part = second[0].astype(np.float64)[np.ix_(kept, kept)]
        best = np.zeros(columns)
        best[kept] = np.linalg.solve(part, second[0].astype(np.float64)[kept] @ row)
        least = (best - row) @ second[0] @ (best - row)
        assert error <= 1.02 * least + 1e-5 * float(row @ second[0] @ row)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8)])
@pytest.mark.parametrize("columns", [8, 64, 72, 130])
def test_patterns(pattern: Pattern, columns: int) -> None:
    matrix = weight(2, 3, columns)
    second = np.concatenate([moments(columns), moments(columns, 1)])
    for sparse in (
        prune_obs(matrix, second, 0.3, pattern),
        np.where(lowest_in_rows(np.abs(matrix), pattern), 0, matrix),
    ):
        whole = columns // pattern.of * pattern.of
        kept = (sparse[..., :whole] != 0).reshape(2, 3, -1, pattern.of).sum(-1)
        assert (kept == pattern.kept).all()
        assert (sparse[..., whole:] != 0).all()


def test_rates_protect_what_counts() -> None:
    flat, peaked = f32(np.ones((1, 10, 100))), f32(np.full((1, 10, 100), 1e-6))
    peaked[0, :, :5] = 1.0
    shares = rates([flat, peaked], 0.4, 0.95)
    assert shares[0] == 0 and shares[1] == pytest.approx(0.8, abs=0.16)
    assert sum(shares) / 2 == pytest.approx(0.4, abs=0.08)


@pytest.mark.parametrize("method", ["l1", "l2", "wanda", "second_order"])
def test_salience_ranks_by_what_it_says(method: str) -> None:
    matrix = f32([[[1.0, -2.0, 3.0]]])
    second = f32(np.diag([100.0, 10.0, 1.0]))[None]
    order = salience(matrix, second, method)[0, 0].argsort().tolist()
    assert order == ([0, 1, 2] if method in ("l1", "l2") else [2, 1, 0])


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("method", ["l1", "l2", "wanda", "second_order"])
def test_a_model_of_all_kinds(method: str, scope: str, tmp_path: Path) -> None:
    model, sparse, rows = pruned(tmp_path, method=method, scope=scope, sparsity=0.4)
    zeros, values = sum(r.zeros for r in rows), sum(r.values for r in rows)
    assert len(rows) == 3 and abs(zeros / values - 0.4) < 0.03
    x = {"x": weight(1, 6, 10, 10, seed=30)}
    assert sqnr_db(run(model, x)["y"], run(sparse, x)["y"]) > 2
    assert all(v.const_value is not None and v.uses() for v in sparse.graph.initializers.values())
    assert np.array_equal(model.graph.initializers["w0"].const_value.numpy(), WEIGHTS["w0"])  # type: ignore[union-attr]


def test_the_better_method_loses_less(tmp_path: Path) -> None:
    x = [{"x": weight(1, 6, 10, 10, seed=i)} for i in range(40, 100)]  # correlated by nothing: a hard case
    fidelity = {}
    for method in ("l1", "second_order"):
        # The same sparsity in each layer; rates by layer are tested elsewhere.
        model, sparse, _ = pruned(tmp_path, method=method, sparsity=0.5, scope="layer")
        fidelity[method] = sqnr_db([run(model, f)["y"] for f in x], [run(sparse, f)["y"] for f in x])
    assert fidelity["second_order"] > fidelity["l1"] + 0.5


def test_what_is_kept_is_kept(tmp_path: Path) -> None:
    _, _, rows = pruned(tmp_path, keep_types=["Gemm"])
    assert len(rows) == 2
    with pytest.raises(ConfigError, match="no node is named 'head'"):
        pruned(tmp_path, keep=["head"])
    with pytest.raises(ConfigError, match="no weights for it, or all are kept"):
        pruned(tmp_path, keep_types=["Gemm", "Conv"])
    with pytest.raises(ConfigError, match="prune: keep_types: the model has no 'Gem', did you mean 'Gemm'"):
        pruned(tmp_path, keep_types=["Gem"])


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="pattern"):
        Prune.model_validate({"pattern": "1:4"})


@pytest.mark.parametrize("columns", [9, 70])
def test_zeros_stay_zeros_through_rounding(columns: int) -> None:
    matrix, second = weight(2, 5, columns), np.concatenate([moments(columns), moments(columns, 1)])
    sparse = prune_obs(matrix, second, 0.5, Pattern())
    scale = np.abs(sparse).max(axis=2, keepdims=True) / np.float32(127)
    integers = round_gptq(sparse, second, scale, 127)
    assert (integers[sparse == 0] == 0).all()
    assert (integers != 0).sum() > 0.4 * matrix.size
