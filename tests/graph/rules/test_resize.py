"""A Resize with axes gets scales for all axes."""

from pathlib import Path

import pytest
from support.normalizing import check, refusals
from support.onnx_models import f32, i64, parse, randoms
from support.quantizing import build, weight

HEAD = "net (float[1, 3, 6, 5] x) => (float[a, b, c, d] y) {"


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("axes", ["2, 3", "3, 2", "-1, -2"])
def test_scales(mode: str, axes: str) -> None:
    body = f'{HEAD} y = Resize <mode = "{mode}", axes = [{axes}]> (x, , s) }}'
    normal, notes = check(parse(body, weights={"s": f32([2, 3])}, opset=19), randoms(x=(1, 3, 6, 5)))
    assert notes.applied["resize_all_axes"] == 1
    assert "axes" not in next(n for n in normal.graph if n.op_type == "Resize").attributes


def test_sizes() -> None:
    body = f'{HEAD} y = Resize <mode = "linear", axes = [2, 3]> (x, , , s) }}'
    _, notes = check(parse(body, weights={"s": i64([9, 4])}, opset=19), randoms(x=(1, 3, 6, 5)))
    assert notes.applied["resize_all_axes"] == 1


@pytest.mark.parametrize("axes", ["2, 3", "-2, -1"])
@pytest.mark.parametrize("sizes", [(12, 10), (9, 3), (6, 15)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_sizes_where_the_batch_is_open(mode: str, axes: str, sizes: tuple[int, int]) -> None:
    head = HEAD.replace("1, 3", "n, 3")
    body = f'{head} y = Resize <mode = "{mode}", axes = [{axes}]> (x, , , s) }}'
    _, notes = check(parse(body, weights={"s": i64(sizes)}, opset=19), randoms(x=(2, 3, 6, 5)))
    assert notes.applied["resize_all_axes"] == 1


@pytest.mark.parametrize(("shape", "sizes"), [("n, 3, h, 5", (9, 10)), ("n, 3, 6, 5", (6, 7))])
def test_sizes_that_no_scale_gives_stay(shape: str, sizes: tuple[int, int]) -> None:
    body = f"{HEAD.replace('1, 3, 6, 5', shape)} y = Resize <axes = [2, 3]> (x, , , s) }}"
    _, notes = check(parse(body, weights={"s": i64(sizes)}, opset=19), randoms(x=(1, 3, 6, 5)))
    assert "unknown" in refusals(notes)["resize_all_axes"]


def test_what_is_not_rewritten() -> None:
    body = f'{HEAD} y = Resize <axes = [2, 3], keep_aspect_ratio_policy = "not_larger"> (x, , , s) }}'
    _, notes = check(parse(body, weights={"s": i64([9, 4])}, opset=19), randoms(x=(1, 3, 6, 5)))
    assert "aspect" in refusals(notes)["resize_all_axes"]


def test_sizes_between_integer_convolutions_of_an_open_batch(tmp_path: Path) -> None:
    """With ``axes`` the runtime refuses the file: it finds no sizes."""
    body = """net (float[n, 4, 8, 8] x) => (float[a, b, c, d] y) {
        c = Conv(x, w)  o = Resize <axes = [2, 3]> (c, , , s)  y = Conv(o, v) }"""
    weights = {"w": weight(6, 4, 1, 1), "v": weight(3, 6, 1, 1, seed=2), "s": i64([16, 12])}
    assert build(tmp_path, body, weights, opset=19).sqnr_db > 30


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_between_integer_convolutions(mode: str, tmp_path: Path) -> None:
    """With ``axes`` the runtime fails in the first run: 'indices element out of data bounds'."""
    body = f"""net (float[1, 4, 8, 8] x) => (float[a, b, c, d] y) {{
        c = Conv(x, w)  o = Resize <mode = "{mode}", axes = [2, 3]> (c, , s)  y = Conv(o, v) }}"""
    weights = {"w": weight(6, 4, 1, 1), "v": weight(3, 6, 1, 1, seed=2), "s": f32([2, 2])}
    assert build(tmp_path, body, weights, opset=19).sqnr_db > 30
