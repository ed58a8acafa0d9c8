"""Convolutions of three input channels are padded to four where the target's fast kernel needs it."""

from pathlib import Path

import numpy as np
import pytest
from support.quantizing import build, target, weight

from edgepack.config.target import Target

BODY = """net (float[2, {c}, 9, 8] x) => (float[2, 6, 1, 1] y) {{
    a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w, b)
    r = Relu (a)
    p = Conv <pads = [1, 1, 1, 1]> (r, v)
    y = GlobalAveragePool (p)
}}"""


def device(multiple: int) -> Target:
    base = target()
    settings = base.quantization.model_copy(update={"input_channels_multiple": multiple})
    return base.model_copy(update={"quantization": settings})


@pytest.mark.parametrize(("channels", "added"), [(3, 1), (4, 0), (1, 0), (2, 0), (6, 2)])
def test_added(tmp_path: Path, channels: int, added: int) -> None:
    weights = {"w": weight(8, channels, 3, 3), "b": weight(8), "v": weight(6, 8, 3, 3)}
    built = build(tmp_path, BODY.format(c=channels), weights, device=device(4))
    first = next(u for u in built.plan.groups if u.group.op_type == "Conv")
    assert first.added_channels == added
    assert [n.op_type for n in built.quantized.graph].count("Pad") == (1 if added else 0)
    assert built.fused.integer_kernels["QLinearConv"] == 2
    assert built.sqnr_db > 30
    # The runtime computes unused outputs: 65 µs of a detector with a picture of 352 x 352.
    unread = [v for n in built.quantized.graph for v in n.outputs if not (v.uses() or v.is_graph_output())]
    assert unread == []


def test_the_result_is_the_same(tmp_path: Path) -> None:
    weights = {"w": weight(8, 3, 3, 3), "b": weight(8), "v": weight(6, 8, 3, 3)}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    body = BODY.format(c=3)
    padded = build(tmp_path / "a", body, weights, device=device(4))
    plain = build(tmp_path / "b", body, weights, device=device(1))
    assert np.isclose(padded.sqnr_db, plain.sqnr_db, rtol=0, atol=1e-9)
