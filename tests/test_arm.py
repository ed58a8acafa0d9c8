"""What an ARM core computes from a built model: the same bits on every core, nearly the host's values.

Run with ``pytest -m rig`` after ``python tests/rig/arm.py --install`` (as root, once).
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
from rig.arm import missing, root_folder, run_arm
from rig.run_model import digest, run

from edgepack.ir.numerics import sqnr_db

pytestmark = [
    pytest.mark.rig,
    pytest.mark.skipif(bool(missing()), reason="no aarch64 rig: " + "; ".join(missing())),
]

SCRIPT = Path(__file__).parent / "rig" / "run_model.py"
CORES = ["cortex-a53", "cortex-a76", "max,sme=off,sve=off"]
"""Without dot product, with it, and with the matrix instructions of i8mm."""
HOST_FLOOR_DB = 30.0
"""x86 rounds some additions one step apart, and 8 bits hold about 40 dB of a signal."""

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
Arrays = dict[str, npt.NDArray[Any]]


def samples(seed: int, count: int) -> list[npt.NDArray[np.float32]]:
    """Inputs of the network."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, 3, 16, 16), dtype=np.float32) for _ in range(count)]


def build(model: Path, target: str, out: Path, method: str = "static") -> Path:
    """``model`` built for ``target`` in the folder ``out``; static: integers throughout, from 16 samples."""
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
    """Eight samples that calibration has not seen."""
    path = network.with_name("inputs.npz")
    np.savez(path, **{f"{i}/x": x for i, x in enumerate(samples(2, 8))})  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module", params=["arm-cpu", "mobile"])
def built(request: pytest.FixtureRequest, network: Path) -> Path:
    """The network built for a target."""
    return built_for(request.param, network)


@functools.cache
def built_for(target: str, network: Path) -> Path:
    """``network`` built for ``target``, once, beside it."""
    return build(network, target, network.with_name(target))


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, network: Path) -> Path:
    """The network built for arm-cpu with s8 activations instead of u8."""
    folder = Path(__file__).parent.parent / "targets"
    text = (folder / "arm-cpu.yaml").read_text()
    copy: Path = tmp_path_factory.mktemp("targets") / "arm-cpu-s8.yaml"
    assert "activation_type: uint8" in text
    copy.write_text(text.replace("activation_type: uint8", "activation_type: int8"))
    return build(network, str(copy), network.with_name("s8"))


@functools.cache  # seconds each; the files do not change while the module runs
def on_arm(core: str, model: Path, inputs: Path) -> Arrays:
    """Outputs of an emulated core, checked against the digest that it printed."""
    saved = model.with_name(f"{model.name}-{CORES.index(core)}.npz")
    told = json.loads(run_arm(root_folder(), core, SCRIPT, [model, inputs, saved]).stdout)
    assert told["machine"] == "aarch64"
    with np.load(saved) as archive:
        outputs = dict(archive)
    assert digest(outputs) == told["sha256"]
    assert len(outputs) == told["samples"] == 8
    return outputs


def together(outputs: Arrays) -> npt.NDArray[np.float32]:
    """All samples as one array, in order."""
    return np.concatenate([outputs[key].ravel() for key in sorted(outputs)])


def test_every_core_computes_the_same_bits_and_nearly_those_of_the_host(built: Path, inputs: Path) -> None:
    runs = {core: on_arm(core, built, inputs) for core in CORES}
    assert len({digest(outputs) for outputs in runs.values()}) == 1, "cores differ"
    host = run(built, inputs, settings={}, disabled=[])
    assert sqnr_db(together(host), together(runs[CORES[0]])) >= HOST_FLOOR_DB


def test_u8_and_s8_activations_compute_the_same_bits(network: Path, signed: Path, inputs: Path) -> None:
    unsigned = built_for("arm-cpu", network)
    assert unsigned.read_bytes() != signed.read_bytes()
    assert digest(on_arm("cortex-a76", unsigned, inputs)) == digest(on_arm("cortex-a76", signed, inputs))


def test_int8_on_arm_is_faithful_to_the_float_network(network: Path, built: Path, inputs: Path) -> None:
    exact = run(network, inputs, settings={}, disabled=[])
    assert sqnr_db(together(exact), together(on_arm("cortex-a53", built, inputs))) >= HOST_FLOOR_DB - 5


@pytest.mark.parametrize("method", ["static", "float"])
def test_the_ort_file_loads_on_arm_and_computes_the_same_bits(
    network: Path, inputs: Path, method: str
) -> None:
    """A float one that was written on x86 in its NCHWc layout would not load."""
    model = build(network, "mobile", network.with_name(f"mobile-{method}"), method)
    ort = on_arm("cortex-a76", model.with_suffix(".ort"), inputs)
    assert digest(ort) == digest(on_arm("cortex-a76", model, inputs))
