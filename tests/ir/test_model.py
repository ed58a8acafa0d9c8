import os
import threading
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.onnx_models import Array, conv_net, difference, f32, parse, randoms, run

from edgepack.errors import ExportError, ModelError
from edgepack.graph.normalize import normalize
from edgepack.ir.files import load_model, model_bytes, require_float, save_model
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.inputs import input_specs
from edgepack.ir.model import (
    captured_values,
    clone,
    computed,
    constant,
    fresh_name,
    new_initializer,
    only_consumer,
    set_constant,
    walk_nodes,
)

BRANCHES = """net (bool c, float[2, 3] x) => (float[2, 3] y) {
    k = Constant <value = float[1] {2.0}> ()
    m = Mul (x, k)
    unused = Relu (x)
    y = If (c) <
        then_branch = a () => (float[2, 3] t) { t = Add (m, k) },
        else_branch = b () => (float[2, 3] e) { n = Neg (m)  e = Add (n, w) }>
}"""


def external(folder: Path) -> Path:
    path = folder / "net.onnx"
    body = "net (float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, w) }"
    save_model(parse(body, weights=randoms(w=(64, 64))), path, external=True)
    return path


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.onnx: cannot be read: No such file"):
        load_model(tmp_path / "nothing.onnx")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        load_model(tmp_path)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").touch()
    with pytest.raises(ModelError, match="is empty"):
        load_model(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    "content", [b"hello, this is no model", b"\x00" * 100, b"PK\x03\x04zip", b"\x08\x07"]
)
def test_a_file_that_is_not_onnx(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="is not an ONNX model"):
        load_model(tmp_path / "a.onnx")


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    save_model(conv_net(), tmp_path / "whole.onnx")
    whole = (tmp_path / "whole.onnx").read_bytes()
    cut = tmp_path / "cut.onnx"
    for size in range(1, len(whole), len(whole) // 40):
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut\.onnx: is not an ONNX model, or is cut short"):
            load_model(cut)


def test_nodes_in_any_order_but_not_in_a_cycle(tmp_path: Path) -> None:
    """Runtimes accept such files, and converters to float16 write them, with Casts at the end."""
    model = ir.to_proto(conv_net())
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    path = tmp_path / "turned.onnx"
    path.write_bytes(model.SerializeToString())
    assert fingerprint(load_model(path)) == fingerprint(conv_net())
    next(n for n in model.graph.node if n.op_type == "Relu").input[0] = "s"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"turned\.onnx: its nodes depend on each other in a circle"):
        load_model(path)


def test_external_data_stay_on_disk_and_give_the_same_result(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = load_model(path)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert (
        model_bytes(path) == path.stat().st_size + (tmp_path / "net.onnx.data").stat().st_size > 64 * 64 * 4
    )
    feeds = randoms(x=(2, 64))
    expected = feeds["x"] @ randoms(w=(64, 64))["w"]
    assert difference({"y": expected}, run(path, feeds)) < 1e-6


def test_missing_external_data_name_tensor_and_file(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"net\.onnx: tensor 'w' .*net\.onnx\.data, which does not exist"):
        load_model(path)


def test_short_external_data_name_tensor_and_sizes(tmp_path: Path) -> None:
    path = external(tmp_path)
    os.truncate(tmp_path / "net.onnx.data", 1000)
    with pytest.raises(
        ModelError, match=r"tensor 'w' needs 16384 bytes of .*net\.onnx\.data, which has 1000"
    ):
        load_model(path)


def test_external_data_outside_of_the_folder(tmp_path: Path) -> None:
    path = external(tmp_path)
    proto = onnx.load_model(path, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "../net.onnx.data"
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"outside of the model's folder"):
        load_model(inner / "net.onnx")


def test_a_relative_path_survives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    external(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = load_model(Path("net.onnx"))
    monkeypatch.chdir("/")
    array = constant(model.graph.initializers["w"])
    assert array is not None and np.array_equal(array, randoms(w=(64, 64))["w"])


def test_a_model_without_inputs(tmp_path: Path) -> None:
    model = parse("net () => (float[2] y) { y = Constant <value = float[2] {1.0, 2.0}> () }")
    save_model(model, tmp_path / "a.onnx")
    assert input_specs(load_model(tmp_path / "a.onnx")) == ()


def test_quantized_models_are_refused_with_the_first_node() -> None:
    body = """net (float[2] x) => (float[2] y) {
        s = Constant <value = float {0.1}> ()
        q = QuantizeLinear (x, s)
        y = DequantizeLinear (q, s)
    }"""
    model = parse(body)
    next(n for n in model.graph if n.op_type == "QuantizeLinear").name = "first_q"
    with pytest.raises(ModelError, match=r"'first_q' is a QuantizeLinear; pass the float model"):
        require_float(model, Path("a.onnx"))
    require_float(conv_net(), Path("b.onnx"))


def test_a_negative_dimension_is_dynamic() -> None:
    model = parse("net (float[n, 3] x) => (float[n, 3] y) { y = Relu (x) }")
    model.graph.inputs[0].shape = ir.Shape([-1, 3])
    assert input_specs(model)[0].shape == (None, 3)


def test_input_specs() -> None:
    body = "net (int64[batch, 3] ids, float[2] w, float[?, 4] x) => (float[?, 4] y) { y = Identity (x) }"
    model = parse(body, opset=8, weights={"w": np.ones(2, np.float32)})
    model.graph.inputs.append(model.graph.initializers["w"]) if len(model.graph.inputs) < 3 else None
    specs = {spec.name: spec for spec in input_specs(model)}
    assert list(specs) == ["ids", "x"]  # w is an initializer
    assert specs["ids"].dtype == np.int64 and specs["ids"].shape == ("batch", 3)
    assert specs["x"].dtype == np.float32 and specs["x"].shape is not None and specs["x"].shape[1] == 4


def test_an_input_that_is_no_tensor() -> None:
    model = parse("net (seq(float[2]) s, int64 i) => (float[2] y) { y = SequenceAt (s, i) }")
    with pytest.raises(ModelError, match=r"input 's' is .* only tensors"):
        input_specs(model)


def test_constant_sees_through_identity_and_constant_nodes() -> None:
    body = """net (float[1] x, float[1] d) => (float[1] y) {
        c = Constant <value = float[1] {2.0}> ()
        i = Identity (c)
        j = Identity (w)
        a = Add (i, j)
        b = Add (a, d)
        y = Add (b, x)
    }"""
    model = parse(body, opset=17, weights={"w": f32([3]), "d": f32([4])})
    values = {v.name: v for n in model.graph for v in n.inputs if v is not None}
    two, three = constant(values["i"]), constant(values["j"])
    assert two is not None and two.item() == 2 and three is not None and three.item() == 3
    assert constant(values["x"]) is None and constant(values["a"]) is None
    assert constant(values["d"]) is None  # a default that a caller may replace
    assert constant(None) is None


def test_new_initializer_has_type_shape_and_a_name_of_its_own() -> None:
    model = conv_net()
    value = new_initializer(model.graph, "w1", np.zeros((2, 3), np.float16))
    assert value.name == "w1_1" and value.dtype == ir.DataType.FLOAT16 and list(value.shape or ()) == [2, 3]
    assert model.graph.initializers["w1_1"] is value


def test_fresh_names_avoid_names_in_subgraphs() -> None:
    model = parse(BRANCHES, weights={"w": f32([1])})
    assert [fresh_name(model.graph, base) for base in ("n", "t", "w", "c", "new")] == [
        "n_1", "t_1", "w_1", "c_1", "new"
    ]  # fmt: skip


def test_set_constant_changes_only_this_model() -> None:
    model = conv_net()
    copy = clone(model)
    before = fingerprint(model)
    set_constant(copy, "b2", np.ones(4, np.float32))
    assert fingerprint(copy) != before == fingerprint(model)
    with pytest.raises(ModelError, match="no initializer 'nope'"):
        set_constant(copy, "nope", np.ones(1, np.float32))


def test_clone_shares_tensors_and_nothing_else() -> None:
    model = parse(BRANCHES, weights={"w": f32([1])})
    before, proto = fingerprint(model), ir.to_proto(model).SerializeToString(deterministic=True)
    copy = clone(model)
    assert fingerprint(copy) == before
    assert copy.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    for graph in copy.graphs():
        for node in graph:
            node.name = "changed"
            for value in node.outputs:
                value.name = f"{value.name}_changed"
    copy.graph.initializers["w"].name = "v"
    assert fingerprint(model) == before
    assert ir.to_proto(model).SerializeToString(deterministic=True) == proto
    assert not {id(n) for n in walk_nodes(copy.graph)} & {id(n) for n in walk_nodes(model.graph)}


def test_captured_values_and_only_consumers() -> None:
    model = parse(BRANCHES, weights={"w": f32([1])})
    assert captured_values(model.graph) == {"m", "k", "w"}
    values = {v.name: v for n in model.graph for v in n.outputs}
    assert only_consumer(values["m"]) is None  # two, both in other graphs
    assert only_consumer(values["y"]) is None and only_consumer(values["unused"]) is None
    relu = next(n for n in conv_net().graph if n.op_type == "Relu")
    assert relu.inputs[0] is not None and only_consumer(relu.inputs[0]) is relu


def test_fingerprint_counts_what_is_computed() -> None:
    base = conv_net()
    same = clone(base)
    same.doc_string, same.producer_name = "text", "me"
    same.metadata_props["k"] = "v"
    for node in same.graph:
        node.name, node.doc_string = "other", "text"
    assert fingerprint(same) == fingerprint(base)

    seen = {fingerprint(base)}
    changed = [clone(base) for _ in range(4)]
    set_constant(changed[0], "b3", np.zeros(5, np.float32))
    next(n for n in changed[1].graph if n.op_type == "Conv").attributes.add(ir.AttrInt64s("strides", [2, 2]))
    next(n for n in changed[2].graph if n.op_type == "Relu").op_type = "Sigmoid"
    changed[3].graph.opset_imports[""] = 16
    seen |= {fingerprint(model) for model in changed}
    assert len(seen) == 5


def test_fingerprint_sees_into_subgraphs() -> None:
    weights = {"w": f32([1])}
    other = BRANCHES.replace("Neg (m)", "Abs (m)")
    assert fingerprint(parse(BRANCHES, weights=weights)) != fingerprint(parse(other, weights=weights))


def test_fingerprint_is_the_same_for_external_data(tmp_path: Path) -> None:
    model = load_model(external(tmp_path))
    save_model(model, tmp_path / "inside.onnx", external=False)
    assert fingerprint(load_model(tmp_path / "inside.onnx")) == fingerprint(model)


@pytest.mark.parametrize("how", [True, False])
def test_save_from_external_to_either(tmp_path: Path, how: bool) -> None:
    model = load_model(external(tmp_path))
    target = tmp_path / "out" / "other.onnx"
    target.parent.mkdir()
    save_model(model, target, external=how)
    assert sorted(p.name for p in target.parent.iterdir()) == ["other.onnx", "other.onnx.data"][: 1 + how]
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)  # as it was
    (tmp_path / "net.onnx.data").unlink()
    feeds = randoms(x=(2, 64))
    assert difference({"y": feeds["x"] @ randoms(w=(64, 64))["w"]}, run(target, feeds)) < 1e-6


def test_never_over_its_own_source(tmp_path: Path) -> None:
    path = external(tmp_path)
    before = (tmp_path / "net.onnx.data").read_bytes()
    with pytest.raises(ExportError, match="save under another name"):
        save_model(load_model(path), path, external=True)
    assert (tmp_path / "net.onnx.data").read_bytes() == before


def test_a_wrong_model_leaves_no_file(tmp_path: Path) -> None:
    model = conv_net()
    next(n for n in model.graph if n.op_type == "Relu").op_type = "Rely"
    with pytest.raises(ExportError, match=r"cannot be written: .*Rely"):
        save_model(model, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_model_leaves_the_old_file(tmp_path: Path) -> None:
    model = conv_net()
    save_model(model, tmp_path / "a.onnx")
    before = (tmp_path / "a.onnx").read_bytes()
    next(n for n in model.graph if n.op_type == "Relu").op_type = "Rely"
    with pytest.raises(ExportError):
        save_model(model, tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == before


def test_large_computed_tensors_are_computed_when_read() -> None:
    calls = []

    def double(array: Array) -> Array:
        calls.append(array.size)
        return array * 2

    small, large = ir.tensor(np.ones(4, np.float32)), ir.tensor(np.ones((4096, 1025), np.float32))
    assert computed(small, double).numpy().tolist() == [2.0] * 4 and calls == [4]
    lazy = computed(large, double)
    assert calls == [4] and lazy.shape == large.shape and lazy.dtype == large.dtype
    assert lazy.numpy()[0, 0] == 2 and calls == [4, large.size]


@pytest.mark.large
def test_a_model_of_gigabytes_needs_little_memory(tmp_path: Path) -> None:
    """Load, normalize and save 2.4 GB of weights with less than 1 GB of memory that is not file-backed."""
    layers, width = 24, 5120
    nodes = "".join(f"m{i} = MatMul (h{i}, w{i})\n h{i + 1} = Mul (m{i}, half)\n" for i in range(layers))
    nodes = f"{{ h0 = Relu (x)\n {nodes} y = Relu (h{layers}) }}"
    body = f"net (float[n, {width}] x) => (float[n, {width}] y) {nodes}"
    tensor = ir.LazyTensor(
        lambda: ir.tensor(np.full((width, width), 1e-4, np.float32)),
        ir.DataType.FLOAT,
        ir.Shape((width, width)),
    )
    model = parse(body, weights={"half": f32(0.5)})
    for node in model.graph:
        if node.op_type == "MatMul" and (weight := node.inputs[1]) is not None:
            weight.const_value, weight.type, weight.shape = tensor, ir.TensorType(tensor.dtype), tensor.shape
            model.graph.register_initializer(weight)
    save_model(model, tmp_path / "big.onnx")
    del model
    assert model_bytes(tmp_path / "big.onnx") > 2_400_000_000
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        normal, notes = normalize(load_model(tmp_path / "big.onnx"), min_opset=13, max_opset=21)
        assert notes.applied["fold_after"] == layers
        save_model(normal, tmp_path / "normal.onnx")
    finally:
        stop.set()
        watcher.join()
    assert 0 < peak[0] < 1_000_000_000


def anonymous_bytes() -> int:
    """Memory of this process that is not file-backed."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024
