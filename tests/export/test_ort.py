"""The .ort file: bit-exact with the .onnx, no layouts of the build host, operators of a reduced build."""

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support.onnx_models import Array, conv_net, f32, parse, randoms

from edgepack.config.target import Runtime
from edgepack.errors import ExportError
from edgepack.export.ort import export_ort
from edgepack.ir.files import save_model
from edgepack.ir.model import walk_nodes
from edgepack.runtime.session import open_optimized, open_session, run

# The runtime's tool does not close its input files.
TOOL = "ignore::pytest.PytestUnraisableExceptionWarning"
FEEDS = [randoms(x=(2, 3, 8, 8)), {"x": f32(np.zeros((1, 3, 8, 8)))}]


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    save_model(conv_net(), path)
    return path


def lines(config: Path) -> list[str]:
    return [line for line in config.read_text().splitlines() if not line.startswith("#")]


def quantized(type_name: str) -> ir.Model:
    """A convolution between Q/DQ pairs of ``uint8`` or ``int8``."""
    body = """net (float[1, 4, 8, 8] x) => (float[1, 4, 6, 6] y) {
        q0 = QuantizeLinear (x, s, z) d0 = DequantizeLinear (q0, s, z)
        dw = DequantizeLinear (w, sw, zw) c = Conv (d0, dw)
        q1 = QuantizeLinear (c, s, z) y = DequantizeLinear (q1, s, z)
    }"""
    params: dict[str, Array] = {
        "s": f32(0.05), "z": np.asarray(3, type_name), "sw": f32(0.01), "zw": np.asarray(0, np.int8),
        "w": np.ones((4, 4, 3, 3), np.int8),
    }  # fmt: skip
    return parse(body, weights=params)


def kernel_inputs(model: Path, folder: Path) -> set[ir.DataType | None]:
    """Output types of QuantizeLinear in the graph of an .ort."""
    _, graph = open_optimized(model, Runtime(), folder)
    zeros = [node.inputs[2] for node in walk_nodes(graph.graph) if node.op_type == "QuantizeLinear"]
    return {zero.dtype for zero in zeros if zero is not None}


def test_its_outputs_are_those_of_the_onnx(net: Path, tmp_path: Path) -> None:
    before = net.read_bytes()
    export_ort(net, tmp_path / "net.ort", Runtime(), FEEDS)
    portable = Runtime(disabled_optimizers=("NchwcTransformer",))
    expected, got = (open_session(path, portable) for path in (net, tmp_path / "net.ort"))
    for feed in FEEDS:
        assert np.array_equal(run(expected, feed)["y"], run(got, feed)["y"])
    assert net.read_bytes() == before


def test_no_layout_of_the_host_is_in_it_nor_made_when_it_is_loaded(net: Path, tmp_path: Path) -> None:
    config = export_ort(net, tmp_path / "net.ort", Runtime())
    assert "nchwc" not in config.read_text()
    _, loaded = open_optimized(tmp_path / "net.ort", Runtime(), tmp_path)
    assert not any("nchwc" in node.domain for node in loaded.graph)
    assert any(node.op_type.endswith("Conv") for node in loaded.graph)


def test_kernels_for_s8_need_the_setting_of_the_target(tmp_path: Path) -> None:
    save_model(quantized("int8"), tmp_path / "s8.onnx")
    feeds = [randoms(x=(1, 4, 8, 8))]
    s8 = Runtime(session_config={"session.qdqisint8allowed": "1"})
    export_ort(tmp_path / "s8.onnx", tmp_path / "arm.ort", s8, feeds)
    export_ort(tmp_path / "s8.onnx", tmp_path / "host.ort", Runtime(), feeds)
    assert kernel_inputs(tmp_path / "arm.ort", tmp_path) == {ir.DataType.INT8}
    if platform.machine() == "x86_64":
        assert kernel_inputs(tmp_path / "host.ort", tmp_path) == {ir.DataType.UINT8}


@pytest.mark.filterwarnings(TOOL)
@pytest.mark.parametrize("model", ["conv_net", "quantized", "normalization"])
def test_required_operators_are_those_of_the_runtimes_own_tool(model: str, tmp_path: Path) -> None:
    tool = pytest.importorskip("onnxruntime.tools.ort_format_model")
    body = """net (float[2, 8] x) => (float[2, 8] y) {
        m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) two = Constant <value = float {2}> ()
        p = Pow (d, two) v = ReduceMean <axes = [-1]> (p) e = Add (v, eps) r = Sqrt (e)
        n = Div (d, r) g = Mul (n, gain) b = Add (g, bias) s = Sigmoid (b) y = Mul (b, s)
    }"""
    weights = {"eps": f32(1e-5), "gain": f32(np.ones(8)), "bias": f32(np.ones(8))}
    models = {
        "conv_net": conv_net(),
        "quantized": quantized("uint8"),
        "normalization": parse(body, opset=14, weights=weights),
    }
    save_model(models[model], tmp_path / "net.onnx")
    config = export_ort(tmp_path / "net.onnx", tmp_path / "net.ort", Runtime())
    assert config == tmp_path / "net.required_operators.config"
    tool.create_config_from_models([tmp_path / "net.ort"], tmp_path / "tool.config", False)
    assert sorted(lines(config)) == sorted(lines(tmp_path / "tool.config"))


def test_a_file_with_other_outputs_is_refused(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = conv_net()
    other.graph.initializers["w3"].const_value = ir.tensor(np.ones((5, 4), np.float32), name="w3")
    save_model(other, tmp_path / "other.onnx")

    def swapped(model: Path, runtime: Runtime, **settings: Any) -> Any:
        return open_session(tmp_path / "other.onnx" if model.suffix == ".ort" else model, runtime, **settings)

    monkeypatch.setattr("edgepack.export.ort.open_session", swapped)
    with pytest.raises(
        ExportError, match=r"net\.ort: its outputs have an SQNR of -?\d+\.\d dB against those of .*net\.onnx"
    ):
        export_ort(net, tmp_path / "net.ort", Runtime(), FEEDS)


def test_a_model_that_the_runtime_refuses_makes_no_ort(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"no\.ort: no \.ort could be made: .*no\.onnx"):
        export_ort(tmp_path / "no.onnx", tmp_path / "no.ort", Runtime())
    assert not list(tmp_path.glob("*.config"))


@pytest.mark.skipif(
    "EDGEPACK_SUITE" not in os.environ, reason="EDGEPACK_SUITE does not name the folder of the suite"
)
@pytest.mark.filterwarnings(TOOL)
@pytest.mark.parametrize("task", ["dscnn_fsdd", "minilm_sst2"])
def test_models_of_the_suite(task: str, tmp_path: Path) -> None:
    folder = Path(os.environ["EDGEPACK_SUITE"]) / task
    with np.load(folder / "calib.npz") as arrays:
        feeds = [{name: arrays[name][:1] for name in arrays.files if name != "label"}]
    config = export_ort(folder / "model.onnx", tmp_path / "net.ort", Runtime(), feeds)
    tool = pytest.importorskip("onnxruntime.tools.ort_format_model")
    tool.create_config_from_models([tmp_path / "net.ort"], tmp_path / "tool.config", False)
    assert sorted(lines(config)) == sorted(lines(tmp_path / "tool.config"))
