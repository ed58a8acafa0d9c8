"""A float network with a residual block, built for ARM targets."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

NETWORK = """\
<ir_version: 8, opset_import: ["" : 13]>
net (float[1, 3, 16, 16] x) => (float[1, 10] y) {
  a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w_stem, b_stem)
  b = Relu (a)
  c = Conv <pads = [1, 1, 1, 1], group = 16> (b, w_depth, b_depth)
  d = Relu (c)
  e = Conv (d, w_point, b_point)
  f = Add (b, e)
  g = GlobalAveragePool (f)
  h = Flatten (g)
  y = Gemm <transB = 1> (h, w_head, b_head)
}
"""


WEIGHTS: dict[str, tuple[int, ...]] = {
    **{"w_stem": (16, 3, 3, 3), "w_depth": (16, 1, 3, 3), "w_point": (16, 16, 1, 1), "w_head": (10, 16)},
    **{"b_stem": (16,), "b_depth": (16,), "b_point": (16,), "b_head": (10,)},
}


def samples(seed: int, count: int) -> list[npt.NDArray[np.float32]]:
    """Inputs of the network."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, 3, 16, 16), dtype=np.float32) for _ in range(count)]


def build(model: Path, target: str, out: Path, method: str = "static") -> Path:
    """``model`` built for ``target`` in the folder ``out``; static: full int8, from 16 samples."""
    data = model.with_name("calibration.npz")
    np.savez(data, x=np.concatenate(samples(1, 16)))
    options = {"--target": target, "--calibration-data": data, "--method": method, "--output": out}
    words = [str(word) for option in options.items() for word in option]
    code = "from edgepack.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, "build", str(model), *words], check=True)
    return out / "model.onnx"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float network with a residual block."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(NETWORK)
    for name, shape in WEIGHTS.items():
        scale = 1 / np.sqrt(np.prod(shape[1:]))
        content = (rng.standard_normal(shape) * scale).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(content, name))
    path: Path = tmp_path_factory.mktemp("network") / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def inputs(network: Path) -> Path:
    """Eight samples that are not calibration samples."""
    path = network.with_name("inputs.npz")
    np.savez(path, **{f"{i}/x": x for i, x in enumerate(samples(2, 8))})  # type: ignore[arg-type]
    return path
