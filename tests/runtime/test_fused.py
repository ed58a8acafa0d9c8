"""The graph that the runtime executes, and the times of its nodes."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.onnx_models import Array, conv_net, f32, i64, parse, randoms

from edgepack.benchmark.profile import NodeTime, OpProfile, match_groups, profile_ops, without_profiling
from edgepack.config.target import Runtime, load_target
from edgepack.errors import ModelError
from edgepack.ir.files import save_model
from edgepack.quantization.groups import find_fusion_groups
from edgepack.runtime.fused import FusionReport, fusion_report

PARAMS: dict[str, Array] = {
    "s": f32(0.05), "z": np.asarray(128, np.uint8),
    "sw": f32(0.01), "zw": np.asarray(0, np.int8),
    "w": np.ones((4, 4, 3, 3), np.int8), "bias": f32([[[1]], [[2]], [[3]], [[4]]]),
}  # fmt: skip
IN = "q0 = QuantizeLinear (x, s, z) d0 = DequantizeLinear (q0, s, z)"
WEIGHT = "dw = DequantizeLinear (w, sw, zw)"
OUT = "q9 = QuantizeLinear (c, s, z) y = DequantizeLinear (q9, s, z)"


def qdq(nodes: str) -> ir.Model:
    """``x[1, 4, 8, 8]`` quantized, ``nodes`` from ``d0`` to ``c``, quantized again."""
    body = f"net (float[1, 4, 8, 8] x) => (float[1, 4, H, W] y) {{ {IN} {WEIGHT} {nodes} {OUT} }}"
    return parse(body, weights=PARAMS)


def report(model: ir.Model, folder: Path) -> FusionReport:
    path = folder / "model.onnx"
    save_model(model, path)
    return fusion_report(path, Runtime())


def test_a_good_plan_leaves_conversions_at_the_border_only(tmp_path: Path) -> None:
    found = report(qdq("c = Conv <pads = [1, 1, 1, 1]> (d0, dw)"), tmp_path)
    assert found.integer_kernels == {"QLinearConv": 1}
    assert found.float_operators == {}
    assert (found.leftover_quantize, found.leftover_dequantize) == (1, 1)
    assert [(c.op_type, c.at_border) for c in found.leftover] == [
        ("QuantizeLinear", True),
        ("DequantizeLinear", True),
    ]
    assert found.leftover[0].tensor == "x"
    assert json.loads(json.dumps(found.as_dict()))["leftover"][0]["tensor"] == "x"


def test_a_pair_between_a_convolution_and_its_bias_leaves_it_float(tmp_path: Path) -> None:
    found = report(qdq("a = Conv (d0, dw) q1 = QuantizeLinear (a, s, z) c = Add (a, bias)"), tmp_path)
    assert "QLinearConv" not in found.integer_kernels
    assert any(op.endswith("Conv") for op in found.float_operators)
    assert sum(map(len, found.float_nodes.values())) == sum(found.float_operators.values())


def test_an_operator_without_integer_kernel_shows_with_its_name_and_its_conversions(tmp_path: Path) -> None:
    model = qdq("""
        a = Conv (d0, dw) q1 = QuantizeLinear (a, s, z) d1 = DequantizeLinear (q1, s, z)
        [the_erf] e = Erf (d1)
        q2 = QuantizeLinear (e, s, z) d2 = DequantizeLinear (q2, s, z) c = Conv (d2, dw)""")
    found = report(model, tmp_path)
    assert found.float_operators == {"Erf": 1}
    assert found.float_nodes == {"Erf": ("the_erf",)}
    assert [c.op_type for c in found.leftover if not c.at_border] == ["DequantizeLinear", "QuantizeLinear"]


def test_pooling_of_quantized_tensors_is_integer_and_moves_do_not_count(tmp_path: Path) -> None:
    model = qdq("""
        a = Conv (d0, dw) q1 = QuantizeLinear (a, s, z) d1 = DequantizeLinear (q1, s, z)
        c = MaxPool <kernel_shape = [2, 2]> (d1)""")
    found = report(model, tmp_path)
    assert sum(n for op, n in found.integer_kernels.items() if op.endswith("MaxPool")) == 1
    assert found.float_operators == {}


def test_arithmetic_on_shapes_is_not_float_work(tmp_path: Path) -> None:
    body = """net (float[N, M] x) => (float[A, B] y) {
        n = Shape (x)
        m = Mul (n, two)
        e = Equal (m, two)
        f = Where (e, two, m)
        h = Relu (x)
        y = Expand (h, n)
        z = Add (f, m)
    }"""
    model = parse(body, weights={"two": i64([2, 2])})
    model.graph.outputs.append(next(v for node in model.graph for v in node.outputs if v.name == "z"))
    model.graph.outputs[-1].dtype, model.graph.outputs[-1].shape = ir.DataType.INT64, ir.Shape([2])
    assert report(model, tmp_path).float_operators == {"Relu": 1}


def test_layout_changes_count_where_the_model_has_none(tmp_path: Path) -> None:
    body = (
        "net (float[1, 4, 8] x) => (float[1, 8, 4] y) { r = Relu (x) y = Transpose <perm = [0, 2, 1]> (r) }"
    )
    found = report(parse(body), tmp_path)
    assert (found.transposes, found.inserted_layout_changes) == (1, 0)
    found = report(qdq("c = Conv <pads = [1, 1, 1, 1]> (d0, dw)"), tmp_path)
    assert found.transposes == found.inserted_layout_changes


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"no\.onnx"):
        fusion_report(tmp_path / "no.onnx", Runtime())


def test_times_of_nodes_add_up_to_a_run(tmp_path: Path) -> None:
    body = """net (float[1, 256] x) => (float[1, 256] y) {
        a = MatMul (x, w1) b = Relu (a) c = MatMul (b, w2) d = Erf (c) y = MatMul (d, w3)
    }"""
    model = parse(body, weights=randoms(w1=(256, 256), w2=(256, 256), w3=(256, 256)))
    save_model(model, tmp_path / "net.onnx")
    found = profile_ops(tmp_path / "net.onnx", Runtime(), [randoms(x=(1, 256))], runs=10)
    assert [node.op_type for node in found.nodes] == ["MatMul", "Relu", "MatMul", "Erf", "MatMul"]
    assert next(iter(found.by_op_type)) == "MatMul"
    total = sum(found.by_op_type.values())
    assert total == pytest.approx(sum(node.us for node in found.nodes))
    assert 0.3 * found.run_us < total < 1.5 * found.run_us or found.profiling_us == 0
    assert json.loads(json.dumps(found.as_dict()))["nodes"][0]["outputs"] == ["a"]


def test_what_profiling_adds_is_the_same_for_every_node() -> None:
    left, extra = without_profiling(np.asarray([102.0, 12.0, 3.0, 1.0]), 110.0)
    assert extra == 2.0
    np.testing.assert_allclose(left, np.asarray([100.0, 10.0, 1.0, 0.0]) * 110 / 111)


def test_a_busy_machine_makes_all_nodes_slower_and_none_vanish() -> None:
    quiet = np.asarray([500.0, 200.0, 40.0, 10.0])
    # Other processes had the core half of the time: in the profiler's times, not in that of the run.
    left, _ = without_profiling(2 * quiet + 2, float(quiet.sum()))
    np.testing.assert_allclose(left, quiet, rtol=0.2)
    assert left.sum() == pytest.approx(quiet.sum())


def test_nodes_that_take_less_than_the_run_stay_as_they_are() -> None:
    left, extra = without_profiling(np.asarray([30.0, 20.0]), 80.0)
    assert (left.tolist(), extra) == ([30.0, 20.0], 0.0)


def test_a_branch_counts_as_part_of_its_if(tmp_path: Path) -> None:
    body = """net (float[1, 4] x, bool[1] p) => (float[1, 4] y) {
        r = Relu (x)
        i = If (p) <
            then_branch = t () => (float[1, 4] a) { t0 = Erf (r) a = Relu (t0) },
            else_branch = e () => (float[1, 4] b) { b = Neg (r) }
        >
        y = Relu (i)
    }"""
    save_model(parse(body), tmp_path / "net.onnx")
    feeds = [{"x": f32([[1, 2, 3, 4]]), "p": np.asarray([take])} for take in (True, False)]
    found = profile_ops(tmp_path / "net.onnx", Runtime(), feeds, runs=4)
    assert [node.op_type for node in found.nodes] == ["Relu", "If", "Relu"]


def conv_groups() -> tuple[ir.Model, dict[str, str]]:
    """Conv and Relu, Sigmoid, Gemm and Relu, HardSwish; and the names of the groups by kind."""
    body = """net (float[1, 4, 8, 8] x) => (float[1, 4] y) {
        [conv] a = Conv (x, w) [relu] b = Relu (a)
        [conv2] c = Conv (b, w) [sigmoid] d = Sigmoid (c)
        [pool] e = GlobalAveragePool (d) [flat] f = Flatten (e)
        [gemm] g = Gemm (f, w2) [tanh] t = Tanh (g)
        [swish] y = HardSwish (t)
    }"""
    model = parse(body, weights=randoms(w=(4, 4, 3, 3), w2=(4, 4)))
    return model, {node.name or "": node.op_type for node in model.graph}


@pytest.mark.parametrize(
    ("name", "op_type", "outputs", "group"),
    [
        ("conv", "Conv", ("b",), "conv"),
        ("relu", "Relu", ("b",), "conv"),
        ("b_nchwc", "Conv", ("reorder",), "conv"),
        ("d_nchwc", "Conv", ("reorder",), "conv2"),
        ("conv_token_12", "QLinearConv", ("b_QuantizeLinear_output",), "conv"),
        ("pool", "QLinearGlobalAveragePool", ("u",), "pool"),
        ("fused gemm", "FusedGemm", ("t",), "gemm"),
        ("gemm/MatMulScaleFusion/", "FusedMatMul", ("u",), "gemm"),
        ("g_MatMulInteger", "DynamicQuantizeMatMul", ("u",), "gemm"),
        ("g_MatMulInteger_1", "MatMulIntegerToFloat", ("u",), "gemm"),
        ("Gelu_token_3", "Gelu", ("t",), "tanh"),
        ("Squeeze_token_5", "Squeeze", ("f_QuantizeLinear_output",), "flat"),
        ("Transpose_token_27", "Transpose", ("e",), None),
        ("b_QuantizeLinear", "QuantizeLinear", ("b_QuantizeLinear_output",), None),
        ("b_DequantizeLinear/duplicated", "DequantizeLinear", ("u",), None),
        ("ReorderOutput", "ReorderOutput", ("e",), None),
        ("unknown", "Erf", ("u",), None),
    ],
)
def test_names_that_the_runtime_gives_nodes(
    name: str, op_type: str, outputs: tuple[str, ...], group: str | None
) -> None:
    model, _ = conv_groups()
    groups = find_fusion_groups(model, load_target("x86-cpu").kernels)
    profile = OpProfile((NodeTime(name, op_type, 5.0, ("v",), outputs),), 5.0, 0.0)
    found = match_groups(groups, profile)
    assert found.us == ({} if group is None else {group: 5.0})
    assert found.overhead_us == (5.0 if group is None else 0.0)


def test_nodes_without_a_name_belong_to_their_consumer() -> None:
    model, _ = conv_groups()
    groups = find_fusion_groups(model, load_target("x86-cpu").kernels)
    nodes = (
        NodeTime("HardSigmoid without a name", "HardSigmoid", 2.0, ("t",), ("u",)),
        NodeTime("Mul without a name", "Mul", 3.0, ("u", "t"), ("v",)),
        NodeTime("y_QuantizeLinear", "QuantizeLinear", 4.0, ("v",), ("q",)),
    )
    found = match_groups(groups, OpProfile(nodes, 9.0, 0.0))
    assert found.us == {"swish": 5.0}
    assert [node.op_type for node in found.overhead] == ["QuantizeLinear"]


def test_float_and_integer_models_are_timed_by_the_same_groups(tmp_path: Path) -> None:
    model = conv_net()
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
    groups = find_fusion_groups(model, load_target("x86-cpu").kernels)
    save_model(model, tmp_path / "float.onnx")
    found = match_groups(
        groups, profile_ops(tmp_path / "float.onnx", Runtime(), [randoms(x=(1, 3, 8, 8))], runs=3)
    )
    heavy = {group.name for group in groups if group.op_type in ("Conv", "Gemm")}
    assert len(heavy) == 3 and heavy <= set(found.us)
    float_model, _ = conv_groups()
    body = f"""net (float[1, 4, 8, 8] x) => (float[1, 4, 6, 6] y) {{
        {IN} {WEIGHT} [conv] c = Conv (d0, dw) [relu] r = Relu (c)
        [b_QuantizeLinear] q9 = QuantizeLinear (r, s, z) [b_DequantizeLinear] y = DequantizeLinear (q9, s, z)
    }}"""
    save_model(parse(body, weights=PARAMS), tmp_path / "integer.onnx")
    groups = find_fusion_groups(float_model, load_target("x86-cpu").kernels)
    profile = profile_ops(tmp_path / "integer.onnx", Runtime(), [randoms(x=(1, 4, 8, 8))], runs=3)
    found = match_groups(groups, profile)
    assert set(found.us) == {"conv"}
    assert {node.op_type for node in found.overhead} <= {"QuantizeLinear", "DequantizeLinear", "Transpose"}
