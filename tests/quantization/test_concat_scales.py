"""Shared concat scales: inputs and output have one scale where their ranges allow it."""

from pathlib import Path

import pytest
from support.onnx_models import Array
from support.quantizing import Built, build, weight

from edgepack.quantization.plan.types import Precision

SMALL = weight(4, 4, 1, 1)
TWICE = {"w": SMALL, "u": SMALL * 1.7, "v": weight(3, 8, 1, 1, seed=2)}


def made(folder: Path, inner: str, weights: dict[str, Array], *, shared: bool = True) -> Built:
    body = f"net (float[1, 4, 6, 6] x) => (float[a, b, c, d] y) {{ {inner} y = Conv(o, v) }}"
    return build(folder, body, weights, precision={"o": Precision.SHARED_SCALE} if shared else {})


def scales(built: Built, *names: str) -> set[float]:
    return {float(built.plan.activations[name].scale) for name in names}


def test_inputs_and_output_get_one_scale(tmp_path: Path) -> None:
    inner = "a = Conv(x, w) b = Conv(x, u) o = Concat<axis=1>(a, b)"
    for name in ("shared", "free"):
        (tmp_path / name).mkdir()
    shared = made(tmp_path / "shared", inner, TWICE)
    free = made(tmp_path / "free", inner, TWICE, shared=False)
    assert len(scales(shared, "a", "b", "o")) == 1
    assert len(scales(free, "a", "b", "o")) > 1
    assert shared.fused.integer_kernels == free.fused.integer_kernels
    assert scales(shared, "o") >= {max(scales(free, "a", "b"))}
    assert shared.sqnr_db > 33  # no requantization: better than without, where ranges are similar


def test_shared_scales_pass_moving_operators_and_other_concats(tmp_path: Path) -> None:
    inner = """a = Conv(x, w) m = MaxPool<kernel_shape=[1,1]>(a) b = Conv(m, u)
        p = Concat<axis=2>(m, b) q = Transpose<perm=[0,1,3,2]>(p) r = Conv(q, w) o = Concat<axis=1>(q, r)"""
    built = build(
        tmp_path,
        f"net (float[1, 4, 6, 6] x) => (float[a, b, c, d] y) {{ {inner} y = Conv(o, v) }}",
        TWICE,
        precision={"o": Precision.SHARED_SCALE, "p": Precision.SHARED_SCALE},
    )
    assert len(scales(built, "a", "m", "b", "p", "q", "r", "o")) == 1
    assert built.sqnr_db > 25


@pytest.mark.parametrize(
    ("inner", "factor"),
    [
        (
            "a = Conv(x, w) b = Conv(x, u) o = Concat<axis=1>(a, b)",
            20.0,
        ),  # one would use a twentieth of the range
        ("a = Conv(x, w) h = Conv(x, u) b = Relu(h) o = Concat<axis=1>(a, b)", 1.0),  # saturation is its Relu
        (
            "a = Conv(x, w) h = Conv(x, u) b = Sigmoid(h) o = Concat<axis=1>(a, b)",
            1.0,
        ),  # it has a fixed range
        ("a = Conv(x, w) b = Conv(x, u) o = Concat<axis=1>(a, x)", 1.0),  # the input is not computed
    ],
)
def test_concats_whose_ranges_do_not_allow_it_are_not_changed(
    inner: str, factor: float, tmp_path: Path
) -> None:
    weights = TWICE | {"u": SMALL * factor}
    for name in ("shared", "free"):
        (tmp_path / name).mkdir()
    shared = made(tmp_path / "shared", inner, weights)
    free = made(tmp_path / "free", inner, weights, shared=False)
    assert shared.plan.activations == free.plan.activations
    assert shared.sqnr_db == free.sqnr_db
