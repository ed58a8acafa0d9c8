"""Exported .tflite files in tflite-runtime 2.14, which many devices still have.

Run with ``pytest -m rig`` after ``python tests/rig/old_tflite.py``.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from rig.old_tflite import missing, run_old
from support.tflites import write_conv_net, write_tflite

from edgepack.config.target import Runtime
from edgepack.ir.files import load_model
from edgepack.ir.numerics import sqnr_db
from edgepack.runtime.litert import open_tflite
from edgepack.runtime.runner import open_model

pytestmark = [
    pytest.mark.rig,
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]

EXAMPLE = Path(__file__).parents[2] / "calibration_data"
SAME_DB = 35.0
"""Kernels of 2.14 and of today's XNNPACK round some entries one step apart; eight bits hold about 40 dB."""
LEAST_DB = 25.0


def agrees(original: Path, built: Path, name: str, x: np.ndarray, folder: Path) -> None:
    """Outputs of ``built`` in the old runtime equal those of the current one, nearly those in float."""
    runner = open_tflite(built, 1)
    np.savez(folder / "feed.npz", allow_pickle=False, **runner.prepare({name: x}))
    run_old(built, folder / "feed.npz", folder / "outputs.npz")
    with np.load(folder / "outputs.npz") as found:
        old = {port.name: found[port.name] for port in runner.results}
    today = runner.call(runner.prepare({name: x}))
    for port, expected in zip(runner.results, today, strict=True):
        assert old[port.name].dtype == port.dtype and old[port.name].shape == expected.shape
        assert sqnr_db(expected.astype(np.float32), old[port.name].astype(np.float32)) > SAME_DB
    real = open_model(original, Runtime()).run({name: x})
    assert sqnr_db(list(real.values()), list(runner.run({name: x}).values())) > LEAST_DB


@pytest.mark.parametrize("io", ["float", "int8"])
def test_a_small_network(tmp_path: Path, io: Literal["float", "int8"]) -> None:
    original, built = write_conv_net(tmp_path, io)
    x = np.random.default_rng(5).normal(size=(1, 3, 8, 8)).astype(np.float32)
    agrees(original, built, "x", x, tmp_path)


def test_the_example(tmp_path: Path) -> None:
    with np.load(EXAMPLE / "calibration.npz") as stacked:
        samples = {"logmel": stacked["logmel"][:16]}
    original, built, _ = write_tflite(load_model(EXAMPLE / "digits.onnx"), tmp_path, samples)
    with np.load(EXAMPLE / "evaluation.npz") as stacked:
        x = stacked["logmel"][0].reshape(1, 1, 40, 97)
    agrees(original, built, "logmel", x, tmp_path)


OPERATORS = {
    "Resize": """net (float[1, 4, 6, 6] x) => (float[1, 4, 12, 12] y) {
        e = Constant <value = float[0] {}> ()
        s = Constant <value = float[4] {1.0, 1.0, 2.0, 2.0}> ()
        y = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (x, e, s)
    }""",
    "Softmax": "net (float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y) { y = Softmax <axis = -1> (x) }",
    "HardSwish": "net (float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y) { y = HardSwish (x) }",
    "Concat": """net (float[1, 4, 6, 6] x) => (float[1, 8, 6, 6] y) {
        r = Sigmoid (x)
        y = Concat <axis = 1> (x, r)
    }""",
    "ReduceMean": "net (float[1, 4, 6, 6] x) => (float[1, 4, 1, 1] y) { y = ReduceMean <axes = [2, 3]> (x) }",
}


@pytest.mark.parametrize("op_type", OPERATORS)
def test_an_operator(tmp_path: Path, op_type: str) -> None:
    from support.onnx_models import parse

    rng = np.random.default_rng(0)
    samples = {"x": rng.normal(size=(8, 1, 4, 6, 6)).astype(np.float32)}
    original, built, _ = write_tflite(parse(OPERATORS[op_type]), tmp_path, samples)
    agrees(original, built, "x", rng.normal(size=(1, 4, 6, 6)).astype(np.float32) * 0.9, tmp_path)
