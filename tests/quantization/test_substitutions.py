"""Averages as depthwise convolutions and nearest resizing as picking: the same integers, on other kernels."""

from pathlib import Path

import numpy as np
import pytest
from support.onnx_models import Array, f32, i64, parse
from support.quantizing import U8, Built, build, target, weight

from edgepack.ir.scheme import QuantType
from edgepack.quantization.rewrite.substitutions import has_substitute, sources

BODY = "net (float[{n}, 4, 9, 8] x) => (float[a, b, c, d] y) {{ c = Conv(x, w) o = {o} y = Conv(o, v) }}"
WEIGHTS = {"w": weight(6, 4, 1, 1), "v": weight(3, 6, 1, 1, seed=2)}

AVERAGES = {
    "2 x 2": "AveragePool<kernel_shape=[2,2],strides=[2,2]>(c)",
    "3 x 3, its border counted": "AveragePool<kernel_shape=[3,3],pads=[1,1,1,1],count_include_pad=1>(c)",
    "one-sided border": "AveragePool<kernel_shape=[3,2],pads=[2,0,0,1],count_include_pad=1>(c)",
    "ceil_mode where windows fit": "AveragePool<kernel_shape=[3,2],strides=[2,2],ceil_mode=1>(c)",
    "wide": 'AveragePool<kernel_shape=[1,5],auto_pad="VALID">(c)',
}
OTHER_AVERAGES = {
    "border left out": "AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(c)",
    "ceil_mode": "AveragePool<kernel_shape=[2,2],strides=[2,2],ceil_mode=1>(c)",
    "one window": "AveragePool<kernel_shape=[9,8]>(c)",
    "SAME": 'AveragePool<kernel_shape=[3,3],auto_pad="SAME_UPPER">(c)',
}
MODES = ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners", "half_pixel_symmetric"]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


def both(
    folder: Path, node: str, activation: QuantType = U8, *, batch: str = "n", opset: int = 17, **more: Array
) -> tuple[Built, Built]:
    """The model with the runtime's own kernel and with the substitute."""
    made = []
    for name, ops in (("own", ()), ("other", ("AveragePool", "Resize"))):
        (folder / name).mkdir()
        body = BODY.format(n=batch, o=node)
        device = target(activation, stand_ins=ops)
        made.append(build(folder / name, body, WEIGHTS | more, device=device, opset=opset))
    return made[0], made[1]


@pytest.mark.parametrize("activation", [U8, QuantType.INT8])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_are_convolutions(name: str, activation: QuantType, tmp_path: Path) -> None:
    own, other = both(tmp_path, AVERAGES[name], activation)
    assert own.fused.integer_kernels == {"QLinearConv": 2, "QLinearAveragePool": 1}
    assert other.fused.integer_kernels == {"QLinearConv": 3}
    assert other.fused.float_operators == {}
    assert abs(own.sqnr_db - other.sqnr_db) < 0.5  # ties of a half round either way
    assert "o" in {n.name for n in other.quantized.graph} | {
        v.name for n in other.quantized.graph for v in n.outputs
    }


@pytest.mark.parametrize("name", OTHER_AVERAGES)
def test_averages_that_a_convolution_is_not(name: str, tmp_path: Path) -> None:
    """They compute in float, as a clock would have it, before a convolution; one window is as quick."""
    own, other = both(tmp_path, OTHER_AVERAGES[name])
    assert not any(u.substituted for u in other.plan.groups)
    assert abs(own.sqnr_db - other.sqnr_db) < 0.5
    assert own.forms()["o"] == "static"
    assert other.forms()["o"] == ("static" if name == "one window" else "float")
    # The Max keeps the runtime from fusing the conversions back into its integer kernel.
    pools = {"AveragePool": 1, "Max": 1} if name != "one window" else {}
    assert other.fused.float_operators == pools


def test_a_slow_average_among_integers_that_are_no_convolutions_stays(tmp_path: Path) -> None:
    """In float it would take the addition with it."""
    body = BODY.replace("o = {o} y", "p = {p} o = Add(p, c) y")
    device = target(stand_ins=("AveragePool",))
    built = build(tmp_path, body.format(n="n", p=OTHER_AVERAGES["border left out"]), WEIGHTS, device=device)
    assert built.forms()["p"] == built.forms()["o"] == "static"


def test_many_ones_are_a_shape_in_the_file(tmp_path: Path) -> None:
    """The runtime fills it when it loads the file, and makes the same kernel of it."""
    body = "net (float[n, 64, 9, 8] x) => (float[a, b, c, d] y) { c = Conv(x, w) o = {o} y = Conv(o, v) }"
    wide = {"w": weight(64, 64, 1, 1), "v": weight(3, 64, 1, 1, seed=2)}
    body = body.replace("{o}", AVERAGES["3 x 3, its border counted"])
    built = build(tmp_path, body, wide, device=target(stand_ins=("AveragePool",)))
    assert built.fused.integer_kernels == {"QLinearConv": 3}
    assert built.fused.float_operators == {}
    assert not any(v.name and "ones_q" in v.name for v in built.quantized.graph.initializers.values())
    assert built.sqnr_db > 30


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("size", [(18, 16), (27, 8), (5, 11), (9, 1)])
def test_nearest_is_the_same(mode: str, rounding: str, size: tuple[int, int], tmp_path: Path) -> None:
    node = (
        f'Resize<mode="nearest",coordinate_transformation_mode="{mode}",nearest_mode="{rounding}">(c, , , s)'
    )
    own, other = both(tmp_path, node, batch="1", opset=19, s=i64([1, 6, *size]))
    kinds = [n.op_type for n in other.quantized.graph]
    assert (kinds.count("Gather"), kinds.count("Resize")) in [(2, 0), (0, 1)]
    assert size != (18, 16) or mode not in ("half_pixel", "asymmetric") or "Resize" not in kinds
    assert other.fused.float_operators == {}
    assert np.isclose(own.sqnr_db, other.sqnr_db, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scales", [(2.0, 2.0), (3.0, 3.0), (1.0, 0.4)])
def test_nearest_by_scales(scales: tuple[float, float], tmp_path: Path) -> None:
    own, other = both(tmp_path, 'Resize<mode="nearest">(c, , s)', s=f32([1, 1, *scales]))
    assert "Resize" not in {n.op_type for n in other.quantized.graph}
    assert np.isclose(own.sqnr_db, other.sqnr_db, rtol=0, atol=1e-9)


@pytest.mark.parametrize("axes", ["2,3", "-2,-1"])
def test_nearest_of_some_axes_whose_sizes_no_scale_gives(axes: str) -> None:
    """In the model as it is: normalization speaks of all axes where it can."""
    body = f"net (float[n, 6, 9, 8] x) => (float[n, 6, 18, 24] y) {{ y = Resize<axes=[{axes}]>(x, , , s) }}"
    node = parse(body, opset=19, weights={"s": i64([18, 24])}).graph[0]
    assert has_substitute(node)
    np.testing.assert_array_equal(sources(node, 2, 9, 18), np.repeat(np.arange(9), 2))
    np.testing.assert_array_equal(sources(node, 3, 8, 24), np.repeat(np.arange(8), 3))


def test_what_keeps_the_aspect_ratio_stays() -> None:
    body = """net (float[1, 6, 9, 8] x) => (float[1, 6, 18, 16] y) {
        y = Resize<axes=[2,3], keep_aspect_ratio_policy="not_larger">(x, , , s) }"""
    assert not has_substitute(parse(body, opset=19, weights={"s": i64([18, 24])}).graph[0])


def test_a_resize_that_ends_the_model(tmp_path: Path) -> None:
    body = """net (float[n, 4, 9, 8] x) => (float[a, b, c, d] y) {
        c = Conv(x, w)  o = Resize<mode="nearest">(c, , s)  r = Conv(o, v)  y = Add(o, r) }"""
    more = {"s": f32([1, 1, 2, 2]), "v": weight(6, 6, 1, 1, seed=2), "w": WEIGHTS["w"]}
    built = build(tmp_path, body, more, device=target(stand_ins=("Resize",)))
    assert built.sqnr_db > 30
    unread = [v for n in built.quantized.graph for v in n.outputs if not (v.uses() or v.is_graph_output())]
    assert unread == []
