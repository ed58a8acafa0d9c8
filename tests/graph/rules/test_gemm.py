"""Factors of a Gemm in its constants, and right numbers in every int8 form of it."""

from pathlib import Path

import numpy as np
import pytest
from support.normalizing import check, refusals
from support.onnx_models import Array, f32, parse, randoms
from support.quantizing import build, weight

from edgepack.ir.model import constant
from edgepack.quantization.plan.types import Precision

WEIGHTS = {"w": weight(12, 16), "b": weight(12, seed=1), "one": weight(1, seed=2)}


def net(attributes: str, inputs: str) -> str:
    return f"net (float[n,16] x, float[m,12] z) => (float[n,12] y) {{ y = Gemm<{attributes}>({inputs}) }}"


@pytest.mark.parametrize("bias", [", b", ", one", ""])
@pytest.mark.parametrize("alpha", [1.0, -0.25])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, -3.0])
def test_factors_go_into_constants(alpha: float, beta: float, bias: str) -> None:
    body = net(f"transB=1, alpha={alpha}, beta={beta}", f"x, w{bias}").replace(", float[m,12] z", "")
    normal, notes = check(parse(body, weights=WEIGHTS), randoms(x=(5, 16)))
    (gemm,) = normal.graph
    assert [gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta")] == [1.0, 1.0]
    assert ("fold_gemm_factors" in notes.applied) == (alpha != 1 or beta != 1)
    assert len([v for v in gemm.inputs if v is not None]) == (3 if bias and beta else 2)


def test_a_shared_weight_keeps_its_numbers_for_others() -> None:
    body = """net (float[n,16] x) => (float[n,12] y, float[n,12] z) {
        y = Gemm<transB=1, alpha=0.5>(x, w)  z = Gemm<transB=1>(x, w) }"""
    normal, _ = check(parse(body, weights=WEIGHTS), randoms(x=(5, 16)))
    first, second = (constant(node.inputs[1]) for node in normal.graph)
    assert first is not None and second is not None
    np.testing.assert_array_equal(first, second * f32(0.5))


def test_a_bias_that_is_computed_keeps_its_factor_unless_it_is_zero() -> None:
    feeds = randoms(x=(5, 16), z=(5, 12))
    normal, notes = check(parse(net("transB=1, beta=0.5", "x, w, z"), weights=WEIGHTS), feeds)
    assert "an activation" in refusals(notes)["fold_gemm_factors"]
    assert normal.graph[0].attributes.get_float("beta") == 0.5
    normal, _ = check(parse(net("transB=1, beta=0.0", "x, w, z"), weights=WEIGHTS), feeds)
    assert len(normal.graph[0].inputs) == 2


@pytest.mark.parametrize(
    "precision", [Precision.STATIC, Precision.DYNAMIC, Precision.WEIGHT_ONLY, Precision.STORED]
)
@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_every_int8_form_has_the_bias_that_the_model_has(
    precision: Precision, beta: float, tmp_path: Path
) -> None:
    body = net(f"transB=1, alpha=2.0, beta={beta}", "x, w, b").replace(", float[m,12] z", "")
    large: dict[str, Array] = {"w": weight(12, 16), "b": f32(5 * weight(12, seed=1))}
    assert build(tmp_path, body, large, precision=precision).sqnr_db > 35
