"""Compaction: fewer bytes, the same results, and the names that reports refer to."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.onnx_models import Array, parse, run
from support.quantizing import Built, build, weight

from edgepack.config.target import Runtime
from edgepack.graph.compact import LEAST_CHANNELS, compact, names_of
from edgepack.ir.files import save_model
from edgepack.ir.fingerprint import fingerprint
from edgepack.quantization.plan.types import Precision
from edgepack.runtime.fused import fusion_report

IMAGE = "float[1,4,8,8] x"
ANY = "float[a,b,c,d] y"
CHANNELS = 2 * LEAST_CHANNELS
CNN = f"""net ({IMAGE}) => (float[n,k] y) {{
    c = Conv<kernel_shape=[3,3], dilations=[1,1], strides=[2,2], pads=[1,1,1,1], group=1>(x, w, b)
    r = Relu(c)
    d = Conv<kernel_shape=[1,1], dilations=[1,1], strides=[1,1], pads=[0,0,0,0]>(r, v, e)
    s = Relu(d) p = GlobalAveragePool(s) f = Flatten<axis=1>(p)
    y = Gemm<alpha=1.0, beta=1.0, transB=1>(f, m, k) }}"""
WEIGHTS = {
    "w": weight(CHANNELS, 4, 3, 3),
    "b": weight(CHANNELS),
    "v": weight(CHANNELS, CHANNELS, 1, 1, scale=0.1),
    "e": weight(CHANNELS, seed=2),
    "m": weight(CHANNELS, CHANNELS, seed=3),
    "k": weight(CHANNELS, seed=4),
}
FEEDS = {"x": np.random.default_rng(3).normal(size=(1, 4, 8, 8)).astype(np.float32)}


def written(model: ir.Model, path: Path) -> onnx.ModelProto:
    save_model(model, path)
    proto: onnx.ModelProto = onnx.ModelProto.FromString(path.read_bytes())
    return proto


def smaller(made: Built, folder: Path) -> tuple[onnx.ModelProto, Path]:
    path = folder / "compact.onnx"
    return written(compact(made.quantized, names_of(made.model)), path), path


@pytest.mark.parametrize("precision", [Precision.STATIC, Precision.DYNAMIC, Precision.WEIGHT_ONLY])
def test_compaction_keeps_results_and_kernels_and_saves_bytes(tmp_path: Path, precision: Precision) -> None:
    made = build(tmp_path, CNN, WEIGHTS, precision=precision)
    before = ir.to_proto(made.quantized).SerializeToString(deterministic=True)
    proto, path = smaller(made, tmp_path)
    assert ir.to_proto(made.quantized).SerializeToString(deterministic=True) == before
    assert np.array_equal(run(made.path, FEEDS)["y"], run(path, FEEDS)["y"])
    fused = fusion_report(path, Runtime())
    assert fused.integer_kernels == made.fused.integer_kernels
    assert (fused.leftover_quantize, fused.leftover_dequantize) == (
        made.fused.leftover_quantize,
        made.fused.leftover_dequantize,
    )
    stored = sum(len(t.raw_data) for t in proto.graph.initializer)
    around, before_around = path.stat().st_size - stored, made.path.stat().st_size - stored
    # The names of this model are short already; static biases have scales to derive.
    assert around < (0.6 if precision is Precision.STATIC else 0.7) * before_around


def test_nothing_is_stored_that_can_be_inferred(tmp_path: Path) -> None:
    made = build(tmp_path, CNN, WEIGHTS)
    once = compact(made.quantized, names_of(made.model))
    twice = compact(once, names_of(made.model))
    assert ir.to_proto(twice).SerializeToString() == ir.to_proto(once).SerializeToString()


def test_names_of_the_float_model_are_kept(tmp_path: Path) -> None:
    made = build(tmp_path, CNN, WEIGHTS)
    proto, _ = smaller(made, tmp_path)
    left = {name for node in proto.graph.node for name in node.output}
    float_names = {v.name for node in made.quantized.graph for v in node.outputs} & names_of(made.model)
    assert float_names == {"r", "s", "p", "f", "y"}, "what the plan kept of the float model"
    assert float_names <= left
    assert max(map(len, left - float_names)) <= 2
    assert max(len(t.name) for t in proto.graph.initializer) <= 2
    own = {n.name for n in made.quantized.graph if n.name}
    assert own == {n.name for n in proto.graph.node if n.name}


@pytest.mark.parametrize(
    "precision", [Precision.STATIC, Precision.DYNAMIC, Precision.WEIGHT_ONLY, Precision.FLOAT]
)
def test_constants_keep_their_names_on_request(tmp_path: Path, precision: Precision) -> None:
    """The int8 initializer gets the name of the float constant."""
    made = build(tmp_path, CNN, WEIGHTS, precision=precision)
    kept = compact(made.quantized, names_of(made.model, constants=True))
    proto = written(kept, tmp_path / "kept.onnx")
    types = {t.name: t.data_type for t in proto.graph.initializer}
    assert set(WEIGHTS) <= set(types)
    assert (types["w"] == onnx.TensorProto.INT8) == (precision is not Precision.FLOAT)
    added = {*types, *(n for node in proto.graph.node for n in node.output)} - set(WEIGHTS)
    assert max(map(len, added - names_of(made.model)), default=0) <= 2, "names of what nobody knows are short"
    assert np.array_equal(run(made.path, FEEDS)["y"], run(tmp_path / "kept.onnx", FEEDS)["y"])
    again = compact(kept, names_of(made.model, constants=True))
    assert ir.to_proto(again).SerializeToString() == ir.to_proto(kept).SerializeToString()


def test_a_constant_that_stays_in_float_keeps_its_name_alone(tmp_path: Path) -> None:
    """The int8 copy beside it must have another name."""
    body = f"net ({IMAGE}) => ({ANY}) {{ c = Conv(x, w) d = Mul(c, k) y = Conv(d, w) }}"
    weights = {"w": weight(4, 4, 1, 1), "k": weight(4, 1, 1, seed=2)}
    made = build(tmp_path, body, weights, precision={"c": Precision.STATIC, "y": Precision.FLOAT})
    proto = written(compact(made.quantized, names_of(made.model, constants=True)), tmp_path / "kept.onnx")
    types = {t.name: t.data_type for t in proto.graph.initializer}
    assert types["w"] == onnx.TensorProto.FLOAT
    assert np.array_equal(run(made.path, FEEDS)["y"], run(tmp_path / "kept.onnx", FEEDS)["y"])


def test_new_names_do_not_hide_old_ones(tmp_path: Path) -> None:
    body = f"""net ({IMAGE}, bool p) => ({ANY}, float[e,f,g,h] b) {{
        a = Conv(x, w) c = Relu(a) d = Conv(c, v)
        b = If(p) <then_branch = t () => ({ANY.replace("y", "f")}) {{ f = Mul(d, d) }},
                   else_branch = e () => ({ANY.replace("y", "g")}) {{ g = Neg(d) }}>
        y = Conv(d, v) }}"""
    made = build(
        tmp_path,
        body,
        {"w": weight(4, 4, 1, 1), "v": weight(4, 4, 1, 1, seed=2)},
        feeds={"p": np.asarray(True)},
    )
    _, path = smaller(made, tmp_path)
    for p in (True, False):
        feeds = FEEDS | {"p": np.asarray(p)}
        expected, got = run(made.path, feeds), run(path, feeds)
        assert list(expected) == list(got) == ["y", "b"]
        assert all(np.array_equal(expected[k], got[k]) for k in got)


def test_default_attributes_are_removed_and_others_kept(tmp_path: Path) -> None:
    body = f"""net ({IMAGE}) => ({ANY}) {{
        c = Conv<kernel_shape=[3,3], dilations=[1,1], strides=[2,1], pads=[0,0,0,0], group=1>(x, w)
        l = LeakyRelu<alpha=0.01>(c)
        s = Softmax<axis=-1>(l)
        t = Transpose<perm=[0,1,3,2]>(s)
        y = LeakyRelu<alpha=0.3>(t) }}"""
    model = parse(body, weights={"w": weight(4, 4, 3, 3)})
    next(iter(model.graph)).doc_string = "File /home/somebody/model.py, line 3"
    proto = written(compact(model, names_of(model)), tmp_path / "m.onnx")
    stated = {n.output[0]: {a.name for a in n.attribute} for n in proto.graph.node}
    assert stated == {
        "c": {"kernel_shape", "strides"},
        "l": set(),
        "s": set(),
        "t": {"perm"},
        "y": {"alpha"},
    }
    assert not any(n.doc_string for n in proto.graph.node)


def test_types_are_removed_only_where_they_can_be_inferred(tmp_path: Path) -> None:
    body = f"net ({IMAGE}, int64[2] s) => (float[a,b] y) {{ r = Relu(x) t = Reshape(r, s) y = Neg(t) }}"
    model = parse(body)
    values = {v.name: v for node in model.graph for v in node.outputs}
    for name, shape in {"r": ir.Shape([1, 4, 8, 8]), "t": ir.Shape([4, 64])}.items():
        values[name].type, values[name].shape = ir.TensorType(ir.DataType.FLOAT), shape
    proto = written(compact(model, names_of(model)), tmp_path / "m.onnx")
    (kept,) = proto.graph.value_info
    assert kept.name == "t", "where it comes from only the exporter knew its shape"
    assert [d.dim_value for d in kept.type.tensor_type.shape.dim] == [4, 64]
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [1, 4, 8, 8]


def bias_scales(proto: onnx.ModelProto) -> list[bool]:
    """For each int32 bias, whether its scale is computed."""
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    biases = [n for n in proto.graph.node if kinds.get(n.input[0]) == onnx.TensorProto.INT32]
    return [n.input[1] not in kinds for n in biases]


def test_bias_scales_are_derived_where_they_take_a_share_of_the_file(tmp_path: Path) -> None:
    proto, _ = smaller(build(tmp_path, CNN, WEIGHTS), tmp_path)
    assert bias_scales(proto) == [True] * 3
    few = f"net ({IMAGE}) => ({ANY}) {{ y = Conv<pads=[4,4,4,4]>(x, w, b) }}"
    proto, _ = smaller(
        build(tmp_path, few, {"w": weight(CHANNELS, 4, 9, 9), "b": weight(CHANNELS)}), tmp_path
    )
    assert bias_scales(proto) == [False], "one percent of this file, and a product to compute at each start"


def test_only_an_exact_product_is_derived(tmp_path: Path) -> None:
    made = build(tmp_path, CNN, WEIGHTS)
    for value in made.quantized.graph.initializers.values():
        tensor = value.const_value
        if value.name == "e_s" and tensor is not None:
            value.const_value = ir.tensor(np.nextafter(tensor.numpy(), np.float32(1)))
    proto, path = smaller(made, tmp_path)
    assert sorted(bias_scales(proto)) == [False, True, True]
    save_model(made.quantized, made.path)
    same: Array = run(made.path, FEEDS)["y"]
    assert np.array_equal(same, run(path, FEEDS)["y"])


def test_the_source_is_not_touched(tmp_path: Path) -> None:
    model = build(tmp_path, CNN, WEIGHTS).quantized
    before = fingerprint(model)
    compact(model, ())
    assert fingerprint(model) == before
