"""Constants of groups without an integer form: stored as int8, folded to float when the file is loaded."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.onnx_models import Array, f32, i64, parse, run
from support.quantizing import build, target, weight

from edgepack.graph.normalize import normalize
from edgepack.ir.scheme import Granularity
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.plan.plan import make_plan
from edgepack.quantization.plan.types import Method, Request
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.storable import storable
from edgepack.quantization.weights.rounding import Rounder
from edgepack.quantization.weights.stored_constants import unfolded_bytes
from edgepack.selection.candidates import WholeModel, methods_of, whole_model_methods

FLOOR_DB = 35.0
STORED = "net (float[2, 6, 64] x) => (float[a, b, c] y) {"
CASES = {
    "einsum": (f'{STORED} y = Einsum <equation = "bij,bjk->bik"> (x, w) }}', {"w": weight(2, 64, 48)}),
    "three dimensions": (f"{STORED} y = MatMul (x, w) }}", {"w": weight(2, 64, 48)}),
    "constant on the left": (f"{STORED} y = MatMul (w, x) }}", {"w": weight(256, 6)}),
    "addition": ("net (float[2, 96, 64] x) => (float[a, b, c] y) { y = Sub (x, w) }", {"w": weight(96, 64)}),
    "too small": (f"{STORED} y = Mul (x, w) }}", {"w": weight(6, 64)}),
}


def stored_bytes(model: ir.Model) -> dict[str, int]:
    """Bytes of constants by type, bodies included."""
    found: dict[str, int] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            found[tensor.dtype.name] = found.get(tensor.dtype.name, 0) + tensor.nbytes
    return found


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("name", CASES)
def test_what_no_kernel_takes_is_stored(name: str, granularity: Granularity, tmp_path: Path) -> None:
    body, weights = CASES[name]
    small = {k: w for k, w in weights.items() if w.size < 1024}
    made = build(tmp_path, body, weights, device=target(granularity=granularity))
    if small:
        assert "INT8" not in stored_bytes(made.quantized)
        return
    held = stored_bytes(made.quantized)
    assert held["INT8"] == sum(w.size for w in weights.values())
    assert held["FLOAT"] <= held["INT8"] / 4
    assert "stored" in made.forms().values()
    assert made.sqnr_db > (FLOOR_DB if granularity is Granularity.PER_CHANNEL else 15)
    assert made.fused.float_operators.keys() & {"Cast", "Mul"} == set(), "folded when loaded"


@pytest.mark.parametrize("method", [Method.STATIC, Method.DYNAMIC, Method.WEIGHT_ONLY, Method.STORED])
def test_stored_in_every_form_but_float(method: Method, tmp_path: Path) -> None:
    body, weights = CASES["einsum"]
    assert build(tmp_path, body, weights, method=method).forms() == {"y": "stored"}
    assert build(tmp_path, body, weights, method=Method.FLOAT).forms() == {"y": "float"}


@pytest.mark.parametrize(
    "constant",
    [f32(np.triu(np.full((64, 64), -1e9), 1)), weight(4096, 1), weight(8, 64), i64(np.zeros((64, 64)))],
    ids=["a mask", "a vector", "small", "integers"],
)
def test_what_is_left_as_it_is(constant: Array) -> None:
    value = ir.Value(name="w", const_value=ir.tensor(constant))
    graph = ir.Graph([], [], nodes=[], initializers=[value])
    node = ir.Node("", "Add", [ir.Value(name="x"), value])
    graph.append(node)
    assert storable(node) == ()


def test_a_constant_that_is_needed_in_float_is_not_stored_besides(tmp_path: Path) -> None:
    body = f'{STORED} a = Einsum <equation = "bij,bjk->bik"> (x, w) b = MatMul (x, w) y = Sub (a, b) }}'
    made = build(tmp_path, body, {"w": weight(2, 64, 48)}, method={"b": Method.FLOAT})
    assert "INT8" not in stored_bytes(made.quantized)
    assert "needs 'w' in float" in next(
        u.reason.text for u in made.plan.groups if u.group.op_type == "Einsum"
    )


def branches() -> ir.Model:
    """Both have a constant called ``w``, another one each; the second reads one from outside as well."""

    def body(name: str, seed: int, *, outer: bool) -> onnx.GraphProto:
        tensor = onnx.numpy_helper.from_array(weight(64, 64, seed=seed) * 10.0**seed, "w")
        nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["m"])]
        nodes.append(onnx.helper.make_node("MatMul", ["m", "v"], ["o"]) if outer else
                     onnx.helper.make_node("Relu", ["m"], ["o"]))  # fmt: skip
        out = onnx.helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, [2, 64])
        return onnx.helper.make_graph(nodes, name, [], [out], [tensor])

    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=body("yes", 0, outer=False),
                                 else_branch=body("no", 1, outer=True))  # fmt: skip
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 64])
    c = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 64])
    outside = onnx.numpy_helper.from_array(weight(64, 64, seed=5), "v")
    graph = onnx.helper.make_graph([node], "net", [c, x], [y], [outside])
    opset = [onnx.helper.make_opsetid("", 17)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8))


def test_constants_of_bodies_are_stored() -> None:
    model, _ = normalize(branches(), min_opset=13, max_opset=23)
    device = target()
    groups = find_fusion_groups(model, device.kernels)
    plan = make_plan(model, groups, {}, device, {u.name: Request(Method.STORED) for u in groups})
    made = apply_plan(model, plan, Rounder(model)(plan))
    held = stored_bytes(made)
    assert held["INT8"] == 3 * 64 * 64
    assert held["FLOAT"] < 64 * 64
    for choice in (True, False):
        feeds = {"c": np.asarray(choice), "x": f32(np.random.default_rng(1).normal(size=(2, 64)))}
        expected, got = run(model, feeds)["y"], run(made, feeds)["y"]
        assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


def test_a_table_may_be_unfolded_too(tmp_path: Path) -> None:
    body = "net (int64[2, 5] ids) => (float[2, 5, 32] y) { e = Gather (t, ids) y = MatMul (e, w) }"
    weights = {"t": weight(100, 32), "w": weight(32, 32)}
    feeds = {"ids": i64(np.arange(10).reshape(2, 5))}
    stored = build(tmp_path, body, weights, method=Method.STORED, feeds=feeds)
    assert stored.forms() == {"e": "stored", "y": "stored"}
    assert stored.fused.float_operators.keys() & {"Cast", "Mul"} == set()
    looked_up = build(tmp_path, body, weights, method=Method.WEIGHT_ONLY, feeds=feeds)
    assert looked_up.forms() == {"e": "weight_only", "y": "weight_only"}
    assert stored.sqnr_db > FLOOR_DB


def test_what_an_ort_holds_more(tmp_path: Path) -> None:
    body = "net (int64[2, 5] ids) => (float[2, 5, 32] y) { e = Gather (t, ids) y = MatMul (e, w) }"
    weights = {"t": weight(100, 32), "w": weight(32, 32)}
    feeds = {"ids": i64(np.arange(10).reshape(2, 5))}
    stored = build(tmp_path, body, weights, method=Method.STORED, feeds=feeds)
    assert unfolded_bytes(stored.quantized) == 3 * (100 * 32 + 32 * 32)
    looked_up = build(tmp_path, body, weights, method=Method.WEIGHT_ONLY, feeds=feeds)
    assert unfolded_bytes(looked_up.quantized) == 0


def test_it_is_a_form_of_the_whole_model_where_it_differs() -> None:
    body, weights = CASES["einsum"]
    model, _ = normalize(parse(body, weights=weights), min_opset=13, max_opset=23)
    device = target()
    groups = find_fusion_groups(model, device.kernels)
    assert list(whole_model_methods(groups, device)) == ["stored", "float"]
    methods = methods_of(groups, WholeModel.STORED, {}, {})
    assert [m for m, _ in methods.values()] == [Method.STORED]
