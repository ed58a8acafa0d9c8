"""Sharing in a model: what becomes one, and that it stays one through quantization."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import yaml
from support.onnx_models import f32, parse
from support.quantizing import weight

from edgepack.benchmark.bench import ColdStart
from edgepack.compression.share import share
from edgepack.config.passes import Share
from edgepack.config.recipe import load_recipe
from edgepack.config.target import load_target
from edgepack.ir.files import load_model, save_model
from edgepack.pipeline.build import build
from edgepack.pipeline.job import Job

SHARED_SCALE = """net (int64[batch, 4] a, int64[batch, 4] b) => (float[batch, 4, 12] y) {
    e = Gather (t1, a)
    f = Gather (t2, b)
    s = Add (e, f)
    h = MatMul (s, w1)
    r = Relu (h)
    y = MatMul (r, w2)
}"""


def weights(noise: float = 0.0) -> dict[str, Any]:
    table, square = weight(50, 12), weight(12, 12, seed=1)
    return {
        "t1": table, "t2": f32(table + noise * weight(50, 12, seed=5)),
        "w1": square, "w2": f32(square + noise * weight(12, 12, seed=6)),
    }  # fmt: skip


def test_equal_constants_become_one_and_near_ones_within_the_error() -> None:
    shared, replaced = share(parse(SHARED_SCALE, weights=weights()), Share())
    assert {(t.gone, t.kept, t.error) for t in replaced} == {("t2", "t1", 0.0), ("w2", "w1", 0.0)}
    assert set(shared.graph.initializers) == {"t1", "w1"}
    model = parse(SHARED_SCALE, weights=weights(0.01))
    assert share(model, Share())[1] == () and share(model, Share(within=0.001))[1] == ()
    _, replaced = share(model, Share(within=0.05))
    assert len(replaced) == 2 and all(0 < t.error <= 0.05 for t in replaced)
    assert set(model.graph.initializers) == {"t1", "t2", "w1", "w2"}


@pytest.mark.parametrize("method", ["static", "dynamic", "weight_only"])
def test_tied_tables_and_weights_stay_one_copy(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepack.benchmark.bench.cold_start", lambda *_: ColdStart(1.0, 1_000_000))
    save_model(parse(SHARED_SCALE, weights=weights(0.005)), tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    ids = {name: rng.integers(0, 50, (24, 1, 4)) for name in "ab"}
    np.savez(tmp_path / "x.npz", a=ids["a"], b=ids["b"])
    recipe = {
        "model": "model.onnx", "target": "x86-cpu", "output": "dist", "calibration_data": "x.npz",
        "quantize": {"method": method}, "passes": [{"share": {"within": 0.05}}],
        "bench": {"warmup": 0, "runs": 3}, "gate": {"min_sqnr_db": 10},
    }  # fmt: skip
    (tmp_path / "edgepack.yaml").write_text(yaml.safe_dump(recipe))
    job = Job(load_recipe(tmp_path / "edgepack.yaml", {}), load_target("x86-cpu"), tmp_path, "edgepack build")
    report, output = build(job)
    assert [s.name for s in report.waterfall] == ["original", "share", "quantized"]
    assert "2 constants" in report.waterfall[1].notes[0] and report.passed
    held = [v.const_value for v in load_model(output / "model.onnx").graph.initializers.values()]
    sizes = [t.size for t in held if t is not None and t.dtype == ir.DataType.INT8]
    assert sizes.count(600) == 1 and sizes.count(144) == 1
    assert not any(t.size in (600, 144) for t in held if t is not None and t.dtype == ir.DataType.FLOAT)
