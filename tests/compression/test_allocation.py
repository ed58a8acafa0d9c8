"""How many zeros each weight gets, by what they do to outputs."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.onnx_models import Array, f32, parse
from support.quantizing import target, weight
from support.sampling import opened

from edgepack.compression.allocation import MIDDLE, SHARES, Curve, allocate, noise_curves
from edgepack.compression.sparse import Pattern, damped, prune_obs
from edgepack.compression.weights import matrix_of
from edgepack.ir.inputs import input_specs
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.weights.moments import InputMoments, stream_moments


def curve(values: int, gain: float, power: float) -> Curve:
    return Curve(values, 0.0, tuple(gain * share**power for share in SHARES))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(10, 10_000), st.floats(1e-6, 1e3), st.floats(0.3, 8)), min_size=1, max_size=6
    ),
    st.floats(0.01, 0.9),
)
def test_all_together_have_the_share_that_is_wanted(
    groups: list[tuple[int, float, float]], sparsity: float
) -> None:
    curves = {str(i): curve(*group) for i, group in enumerate(groups)}
    shares = allocate(curves, sparsity, 0.95)
    total = sum(c.values for c in curves.values())
    assert sum(shares[n] * c.values for n, c in curves.items()) == pytest.approx(sparsity * total, rel=1e-6)
    assert all(-1e-12 <= share <= 0.95 + 1e-12 for share in shares.values())


def test_noise_rises_by_one_price_a_zero() -> None:
    # Of g·s² the least sum at s₁ + s₂ = 1 has s₁ / s₂ = g₂ / g₁.
    shares = allocate({"a": curve(100, 1.0, 2), "b": curve(100, 3.0, 2)}, 0.5, 0.95)
    assert shares["a"] == pytest.approx(0.75, abs=0.01)
    # Twice as many weights justify twice the noise.
    shares = allocate({"a": curve(100, 1.0, 2), "b": curve(200, 1.0, 2)}, 0.5, 0.95)
    assert shares["b"] == pytest.approx(2 * shares["a"], abs=0.02)


def test_a_curve_that_is_flat_or_falls_decides_all_the_same() -> None:
    flat = Curve(100, 0.0, (0.1,) * len(SHARES))
    shares = allocate(
        {"a": flat, "b": curve(100, 1e-3, 2), "c": Curve(100, 0.0, (0.0,) * len(SHARES))}, 0.4, 0.95
    )
    assert shares["a"] < 0.05 and shares["c"] > 0.9


WIDE = """net (float[batch, 64] x) => (float[batch, 8] y) {
    h = Gemm <transB = 1> (x, w1)
    r = Relu (h)
    y = Gemm <transB = 1> (r, w2)
}"""
WEIGHTS = {"w1": weight(96, 64), "w2": weight(8, 96, seed=2)}


def curves_of(folder: Path, x: Array) -> dict[str, Curve]:
    np.savez(folder / "x.npz", x=x)
    model = parse(WIDE, weights=WEIGHTS)
    samples = opened(folder / "x.npz", *input_specs(model))
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}{index}"
    groups = [u for u in find_fusion_groups(model, target().kernels) if u.op_type == "Gemm"]
    nodes = {n.name: n for n in model.graph}
    halves = samples.halves()
    streams = (stream_moments(model, groups, h, with_second_moments=True, threads=1, seed=0) for h in halves)
    pairs = [(u, matrix_of(nodes[u.name]), a, b) for (u, a), (_, b) in zip(*streams, strict=True)]

    def zeroed(matrix: Array, moments: InputMoments, share: float, damping: float) -> Array:
        assert moments.second is not None
        return prune_obs(matrix, damped(moments.second, damping), share, Pattern())

    return noise_curves(model, pairs, zeroed, halves[1], threads=1)


def test_few_samples_do_not_flatter(tmp_path: Path) -> None:
    """Five samples in each half can be fitted exactly; what is judged is another five."""
    rng = np.random.default_rng(0)
    few, many = (curves_of(tmp_path, f32(rng.normal(size=(n, 1, 64)))) for n in (10, 1000))
    for name in few:
        assert len(few[name].noise) == len(SHARES) and few[name].values == many[name].values
        assert np.all(np.diff(few[name].noise) >= 0)
        # Evaluated on the samples of the fit, it would be near zero.
        assert few[name].noise[MIDDLE] > 0.02
        # Five samples get a stronger damping than five hundred.
        assert few[name].damping >= many[name].damping
    assert few["Gemm2"].damping > 0
    # The last layer's error is the error of the output: its noise equals the cross-validated error.
    assert many["Gemm2"].noise[MIDDLE] < few["Gemm2"].noise[MIDDLE]


def test_halves(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.arange(5, dtype=np.float32).reshape(5, 1, 1).repeat(64, 2))
    samples = opened(tmp_path / "x.npz", *input_specs(parse(WIDE, weights=WEIGHTS)))
    assert [h.indices for h in samples.halves()] == [(0, 2, 4), (1, 3)]
    assert [h.indices for h in samples.spread(1).halves()] == [(0,), (0,)]
