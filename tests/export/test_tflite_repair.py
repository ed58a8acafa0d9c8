"""Repair of a .tflite: its noisiest groups go to float until it is accurate."""

import time
from pathlib import Path

import numpy as np
import pytest
from support import tiny
from support.onnx_models import parse

from edgepack.config.recipe import load_recipe
from edgepack.config.target import load_target
from edgepack.export.tflite_repair import REASON, repair
from edgepack.ir.files import save_model
from edgepack.pipeline.build import build
from edgepack.pipeline.job import Job
from edgepack.quantization.plan.types import Precision, Precisions

NOISE = {f"c{index}": index % 7 + (index + 1) / 100 for index in range(20)}


class Written:
    """A fake file that records the float groups of its last version."""

    def __init__(self, allowed: float) -> None:
        self.allowed = allowed
        self.methods: Precisions = {}

    def write(self, methods: Precisions) -> None:
        assert set(methods.values()) <= {(Precision.FLOAT, REASON)}
        self.methods = methods

    def noise(self) -> float:
        return sum(noise for name, noise in NOISE.items() if name not in self.methods)

    def accurate(self) -> bool:
        return self.noise() <= self.allowed


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 20])
def test_the_fewest_of_the_noisiest_are_in_float(count: int) -> None:
    noisiest = sorted(NOISE, key=lambda name: NOISE[name], reverse=True)
    file = Written(sum(NOISE[name] for name in noisiest[count:]) + 1e-6)
    assert repair(list(NOISE), file.write, file.noise, file.accurate, 60.0) == count
    assert list(file.methods) == noisiest[:count]


def test_a_file_that_cannot_be_repaired_gives_none() -> None:
    file = Written(-1.0)
    assert repair(list(NOISE), file.write, file.noise, file.accurate, 60.0) is None
    assert set(file.methods) == set(NOISE)


def test_nothing_to_repair() -> None:
    file = Written(-1.0)
    assert repair([], file.write, file.noise, file.accurate, 60.0) is None


def test_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    file = Written(30.0)
    assert repair(list(NOISE), file.write, file.noise, file.accurate, 8.0) is None
    assert 0 < len(file.methods) < len(NOISE)


NOISY = """net (float[batch, 8, 32] x) => (float[batch, 4, 32] y) {
    a = Conv (x, wide)
    b = Conv (a, narrow)
    c = Conv (b, last)
    y = Relu (c)
}"""


def test_a_build_repairs_its_tflite(tmp_path: Path) -> None:
    """One channel with a large range leaves few steps of a per-tensor scale for the others."""
    rng = np.random.default_rng(3)
    folder = tiny.project(
        tmp_path / "project",
        metric=None,
        calibration_data={"path": "samples"},
        evaluation_data={"path": "held_out"},
    )
    wide, narrow = (rng.normal(size=(16, n, 1)).astype(np.float32) for n in (8, 16))
    wide[0] *= 4000
    narrow[:, 0] /= 40000
    last = rng.normal(size=(4, 16, 1)).astype(np.float32)
    save_model(parse(NOISY, weights={"wide": wide, "narrow": narrow, "last": last}), folder / "model.onnx")
    for name in ("samples", "held_out"):
        (folder / name).mkdir()
        for index in range(8):
            np.save(folder / name / f"{index}.npy", rng.normal(size=(1, 8, 32)).astype(np.float32))
    recipe = load_recipe(folder / "edgepack.yaml", {"quantize": {"method": "weight_only"}})
    report, _ = build(Job(recipe, load_target("mobile"), folder, "edgepack build"))
    assert not report.refused
    assert all(line.passed for line in report.gate if "dB" in line.limit)
    islands = report.runtime["tflite"]["float_islands"]
    assert any(REASON.text in island for island in islands)
    assert len(islands) < 4
