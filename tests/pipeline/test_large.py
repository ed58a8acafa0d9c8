"""A model with 2.5 GB of weights is built without being in memory as a whole."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from support import tiny

from edgepack.ir.files import load_model, weight_bytes
from edgepack.ir.model import LARGE_BYTES

LAYERS, WIDTH = 20, 5600
MOST_ANONYMOUS_BYTES = 1_000_000_000


def chain(folder: Path) -> int:
    """MatMul and Relu, ``LAYERS`` times, with external data; gives the bytes of the weights."""
    rng = np.random.default_rng(0)
    weights, nodes, offset = [], [], 0
    with (folder / "model.data").open("wb") as file:
        for i in range(LAYERS):
            weight = rng.standard_normal((WIDTH, WIDTH), np.float32) * np.float32((2 / WIDTH) ** 0.5)
            file.write(weight.data)
            tensor = onnx.TensorProto(name=f"w{i}", data_type=1, dims=weight.shape)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": "model.data", "offset": str(offset), "length": str(weight.nbytes)}
            for key, text in place.items():
                tensor.external_data.add(key=key, value=text)
            weights.append(tensor)
            offset += weight.nbytes
            nodes.append(onnx.helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"m{i}"], f"product{i}"))
            nodes.append(onnx.helper.make_node("Relu", [f"m{i}"], [f"x{i + 1}"], f"relu{i}"))
    value = onnx.helper.make_tensor_value_info
    inputs, outputs = [value("x0", 1, ["batch", WIDTH])], [value(f"x{LAYERS}", 1, ["batch", WIDTH])]
    graph = onnx.helper.make_graph(nodes, "chain", inputs, outputs, weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    np.savez(folder / "calib.npz", x0=rng.standard_normal((6, 1, WIDTH), np.float32))
    return offset


def processes(pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += processes(int(child))
    except FileNotFoundError:
        pass  # it ended meanwhile
    return found


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


@pytest.mark.large
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_large_model_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    size = chain(tmp_path)
    assert size > 2_500_000_000
    assert size > LARGE_BYTES
    recipe = {
        "model": "model.onnx",
        "target": "x86-cpu",
        "output": "dist",
        "calibration_data": "calib.npz",
        "bench": {"warmup": 0, "runs": 5},
    }
    (tmp_path / "edgepack.yaml").write_text(yaml.safe_dump(recipe))
    process = subprocess.Popen(
        [sys.executable, "-m", "edgepack", "build"],
        cwd=tmp_path,
        env=tiny.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(anonymous_bytes, processes(process.pid))))
        time.sleep(0.02)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert 50_000_000 < peak < MOST_ANONYMOUS_BYTES  # less would mean that nothing was measured
    report = json.loads((tmp_path / "dist/report.json").read_text())
    original, built = report["models"]
    assert built["size_bytes"] < 0.26 * original["size_bytes"]
    assert built["fidelity"]["sqnr_db"] > 20
    assert report["runtime"]["integer_kernels"]
    assert weight_bytes(load_model(tmp_path / "dist/model.onnx")) == pytest.approx(size / 4, rel=0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "calib.npz", "dist", "edgepack.yaml", "model.data", "model.onnx",
    ]  # fmt: skip
