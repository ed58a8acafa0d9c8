"""Pad of some axes becomes one of all, and runs on integers between convolutions."""

from pathlib import Path

import numpy as np
import pytest
from support.normalizing import check, refusals
from support.onnx_models import i64, parse, randoms
from support.quantizing import build, weight


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
@pytest.mark.parametrize(
    ("axes", "pads", "whole"),
    [
        ([2, 3], [1, 2, 3, 1], [0, 0, 1, 2, 0, 0, 3, 1]),
        ([-1], [2, 1], [0, 0, 0, 2, 0, 0, 0, 1]),
        ([3, 2], [1, 2, 3, 1], [0, 0, 2, 1, 0, 0, 1, 3]),
    ],
)
def test_amounts_of_all_axes_are_given(mode: str, axes: list[int], pads: list[int], whole: list[int]) -> None:
    body = f'net (float[1,3,6,5] x) => (float[a,b,c,d] y) {{ y = Pad<mode="{mode}">(x, p, , s) }}'
    weights = {"p": i64(pads), "s": i64(axes)}
    normal, notes = check(parse(body, opset=18, weights=weights), randoms(x=(1, 3, 6, 5)))
    (pad,) = normal.graph
    assert notes.applied["pad_all_axes"] == 1
    assert len(pad.inputs) <= 3, "no axes"
    stored = pad.inputs[1]
    assert stored is not None and stored.const_value is not None
    np.testing.assert_array_equal(stored.const_value.numpy(), whole)


def test_axes_that_are_computed_stay() -> None:
    body = """net (float[1,3,6,5] x, int64[2] p) => (float[a,b,c,d] y) { y = Pad<mode="edge">(x, p, , s) }"""
    feeds = {**randoms(x=(1, 3, 6, 5)), "p": i64([1, 2])}
    _, notes = check(parse(body, opset=18, weights={"s": i64([2])}), feeds)
    assert "run time" in refusals(notes)["pad_all_axes"]


def test_it_runs_between_integer_convolutions(tmp_path: Path) -> None:
    body = """net (float[1,3,8,8] x) => (float[a,b,c,d] y) {
        c = Conv(x, w) r = Relu(c) p = Pad<mode="edge">(r, n, , s) y = Conv(p, v) }"""
    weights = {
        "w": weight(8, 3, 3, 3),
        "v": weight(4, 8, 3, 3, seed=2),
        "n": i64([1, 1, 1, 1]),
        "s": i64([2, 3]),
    }
    made = build(tmp_path, body, weights, opset=18)
    assert made.fused.integer_kernels == {"QLinearConv": 2}
    assert made.sqnr_db > 30
