"""Outputs of built models on ARM cores: equal bits on every core, close to those of the host.

Run with ``pytest -m rig`` after ``python tests/rig/arm.py --install`` (as root, once).
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from rig.arm import missing, root_folder, run_arm
from rig.run_model import by_sample, digest
from support.arm_network import build

from edgepack.config.target import load_target
from edgepack.ir.numerics import sqnr_db
from edgepack.runtime.host import for_accuracy
from edgepack.runtime.runner import open_model

pytestmark = [
    pytest.mark.rig,
    pytest.mark.skipif(bool(missing()), reason="no aarch64 rig: " + "; ".join(missing())),
]

SCRIPT = Path(__file__).parents[1] / "rig" / "run_model.py"
CORES = ["cortex-a53", "cortex-a76", "max,sme=off,sve=off"]
"""Without dot product, with it, and with the matrix instructions of i8mm."""
HOST_FLOOR_DB = 30.0
"""x86 rounds some additions one step apart, and 8 bits hold about 40 dB of a signal."""

Arrays = dict[str, npt.NDArray[Any]]


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
    folder = Path(__file__).parents[2] / "targets"
    text = (folder / "arm-cpu.yaml").read_text()
    copy: Path = tmp_path_factory.mktemp("targets") / "arm-cpu-s8.yaml"
    assert "activation_type: uint8" in text
    copy.write_text(text.replace("activation_type: uint8", "activation_type: int8"))
    return build(network, str(copy), network.with_name("s8"))


@functools.cache  # seconds each; the files do not change while the module runs
def on_arm(core: str, model: Path, inputs: Path) -> Arrays:
    """Outputs of an emulated core, checked against the digest that it printed."""
    saved = model.with_name(f"{model.name}-{CORES.index(core)}.npz")
    printed = json.loads(run_arm(root_folder(), core, SCRIPT, [model, inputs, saved]).stdout)
    assert printed["machine"] == "aarch64"
    with np.load(saved) as archive:
        outputs = dict(archive)
    assert digest(outputs) == printed["sha256"]
    assert len(outputs) == printed["samples"] == 8
    return outputs


def on_host(model: Path, inputs: Path) -> Arrays:
    """Outputs of this host, with integer kernels that do not saturate, as on ARM."""
    runner = open_model(model, for_accuracy(load_target("arm-cpu")))
    with np.load(inputs) as archive:
        samples = by_sample(archive)
    return {
        f"{index}/{name}": output
        for index, feeds in enumerate(samples)
        for name, output in runner.run(feeds).items()
    }


def together(outputs: Arrays) -> npt.NDArray[np.float32]:
    """All samples as one array, in order."""
    return np.concatenate([outputs[key].ravel() for key in sorted(outputs)])


def test_every_core_computes_the_same_bits_and_nearly_those_of_the_host(built: Path, inputs: Path) -> None:
    runs = {core: on_arm(core, built, inputs) for core in CORES}
    assert len({digest(outputs) for outputs in runs.values()}) == 1, "cores differ"
    host = on_host(built, inputs)
    assert sqnr_db(together(host), together(runs[CORES[0]])) >= HOST_FLOOR_DB


def test_u8_and_s8_activations_compute_the_same_bits(network: Path, signed: Path, inputs: Path) -> None:
    unsigned = built_for("arm-cpu", network)
    assert unsigned.read_bytes() != signed.read_bytes()
    assert digest(on_arm("cortex-a76", unsigned, inputs)) == digest(on_arm("cortex-a76", signed, inputs))


def test_int8_on_arm_is_faithful_to_the_float_network(network: Path, built: Path, inputs: Path) -> None:
    exact = on_host(network, inputs)
    assert sqnr_db(together(exact), together(on_arm("cortex-a53", built, inputs))) >= HOST_FLOOR_DB - 5


@pytest.mark.parametrize("method", ["static", "float"])
def test_the_ort_file_loads_on_arm_and_computes_the_same_bits(
    network: Path, inputs: Path, method: str
) -> None:
    """A float .ort written on x86 in NCHWc layout would not load."""
    model = build(network, "mobile", network.with_name(f"mobile-{method}"), method)
    ort = on_arm("cortex-a76", model.with_suffix(".ort"), inputs)
    assert digest(ort) == digest(on_arm("cortex-a76", model, inputs))
