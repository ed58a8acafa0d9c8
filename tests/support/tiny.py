"""A project that builds in a few seconds: a small model, samples and a recipe; runs the command line."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from support.onnx_models import f32, parse

import edgepack
from edgepack.ir.files import save_model

INPUTS, HIDDEN, CLASSES = 16, 24, 4
NET = """net (float[batch, 16] x) => (float[batch, 4] y) {
    h = Gemm <transB = 1> (x, w1, b1)
    r = Relu (h)
    y = Gemm <transB = 1> (r, w2, b2)
}"""


def samples(count: int, seed: int) -> npt.NDArray[np.float32]:
    """Inputs ``[count, 1, 16]``."""
    return np.random.default_rng(seed).normal(size=(count, 1, INPUTS)).astype(np.float32)


def weights(seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """The weights of ``NET``."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (HIDDEN, INPUTS), "b1": (HIDDEN,), "w2": (CLASSES, HIDDEN), "b2": (CLASSES,)}
    return {name: f32(rng.normal(size=shape) / shape[-1] ** 0.5) for name, shape in shapes.items()}


def project(folder: Path, *, seed: int = 0, **recipe: Any) -> Path:
    """Write model.onnx, calib.npz, eval.npz, edgepack.yaml; ``recipe`` sets keys, ``None`` removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(parse(NET, weights=weights(seed)), folder / "model.onnx")
    np.savez(folder / "calib.npz", x=samples(24, 1))
    np.savez(folder / "eval.npz", x=samples(12, 2), label=np.arange(12) % CLASSES)
    content: dict[str, Any] = {
        "model": "model.onnx",
        "target": "x86-cpu",
        "output": "dist/{target}",
        "calibration_data": {"path": "calib.npz"},
        "evaluation_data": {"path": "eval.npz", "labels": {"array": "label"}},
        "preset": "fast",
        "quantize": {"method": "static"},
        "bench": {"warmup": 0, "runs": 3},
        "gate": {},
    }
    content = {k: v for k, v in {**content, **recipe}.items() if v is not None}
    (folder / "edgepack.yaml").write_text(yaml.safe_dump(content))
    return folder


def environment() -> dict[str, str]:
    """Environment of a process that imports the same edgepack as this one, in any working directory."""
    return {**os.environ, "PYTHONPATH": str(Path(edgepack.__file__).parent.parent), "COLUMNS": "200"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``edgepack <arguments>`` in ``folder``."""
    command = [sys.executable, "-m", "edgepack", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=120
    )


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """:func:`run` in the background."""
    command = [sys.executable, "-m", "edgepack", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def snapshot(folder: Path) -> Mapping[str, tuple[bytes, int]]:
    """Content and modification time of each file, by path."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
