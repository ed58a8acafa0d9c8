"""What is trained, under which keys, and that nothing else of a file changes when it is written back."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `tune`")

from support.onnx_models import batch_norm, conv_net, f32, i64, parse, randoms, run

from edgepack.ir.files import load_model, save_model
from edgepack.training.graph import as_tensor, compile_model, run_program
from edgepack.training.weights import Kind, array_of, keys_of, trainables, with_weights


def node_bytes(graph: onnx.GraphProto) -> list[bytes]:
    """All nodes but Constants, those of bodies included, as they are in the file."""
    found = []
    for node in graph.node:
        bodies = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        if bodies:
            found += [part for body in bodies for part in node_bytes(body)]
        elif node.op_type != "Constant":
            found.append(node.SerializeToString(deterministic=True))
    return found


def proto(path: Path) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.ParseFromString(path.read_bytes())
    return model


def scaled(model: ir.Model, factor: float = 0.5) -> ir.Model:
    keys = trainables(model)
    contents = {key: array_of(value) for value, key in keys_of(model).items()}
    return with_weights(model, {key: contents[key] * factor for key in keys})


def test_weights_are_chosen_by_the_slots_of_their_readers() -> None:
    body = """net (float[2, 3, 6, 6] x, int64[2] i) => (float[2, 4] y) {
        wi = Identity (w)
        c = Conv (x, wi, cb)
        n = BatchNormalization (c, bn_scale, bn_bias, bn_mean, bn_var)
        r = Pow (n, two)
        g = GlobalAveragePool (r)
        f = Flatten (g)
        m = MatMul (f, w2)
        a = Add (m, b2)
        row = Gather (table, i)
        s = Add (a, row)
        y = Add (s, offset)
    }"""
    weights = randoms(w=(5, 3, 3, 3), cb=(5,), w2=(5, 4), b2=(4,), table=(7, 4), offset=(4,))
    model = parse(body, weights={**weights, **batch_norm("bn", 5), "two": f32(2)})
    kinds = {key: t.kind for key, t in trainables(model).items()}
    assert kinds == {
        "w": Kind.WEIGHT,
        "cb": Kind.BIAS,
        "bn_scale": Kind.SCALE,
        "bn_bias": Kind.BIAS,
        "w2": Kind.WEIGHT,
        "b2": Kind.BIAS,
        "table": Kind.TABLE,
    }


def test_only_the_weights_of_a_file_change(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    save_model(conv_net(), before)
    model = load_model(before)
    save_model(scaled(model), after)
    old, new = proto(before), proto(after)
    assert node_bytes(old.graph) == node_bytes(new.graph)
    assert [t.name for t in old.graph.initializer] == [t.name for t in new.graph.initializer]
    for a, b in zip(old.graph.initializer, new.graph.initializer, strict=True):
        factor = 1 if a.name in ("bn_mean", "bn_var") else 0.5
        assert np.array_equal(onnx.numpy_helper.to_array(a) * factor, onnx.numpy_helper.to_array(b))
    for tensors in (old.graph.initializer, new.graph.initializer):
        del tensors[:]
    assert old.SerializeToString(deterministic=True) == new.SerializeToString(deterministic=True)
    onnx.checker.check_model(str(after))
    feeds = randoms(x=(2, 3, 8, 8))
    with torch.no_grad():
        mine = run_program(compile_model(load_model(after)), {"x": as_tensor(feeds["x"])})
    np.testing.assert_allclose(mine["y"].numpy(), run(after, feeds)["y"], rtol=1e-4, atol=1e-5)


def test_constants_of_nodes_and_branches_are_weights_too(tmp_path: Path) -> None:
    body = """net (bool c, float[1, 2] x) => (float[1, 2] y) {
        y = If (c) <
            then_branch = yes () => (float[1, 2] a) {
                k = Constant <value = float[2, 2] {1, 2, 3, 4}> ()
                a = MatMul (x, k)
            },
            else_branch = no () => (float[1, 2] b) {
                k = Constant <value = float[2, 2] {5, 6, 7, 8}> ()
                b = MatMul (x, k)
            }
        >
    }"""
    model = parse(body)
    assert set(trainables(model)) == {"k", "k#2"}
    changed = with_weights(model, {"k#2": f32([[1, 0], [0, 1]])})
    save_model(changed, tmp_path / "changed.onnx")
    x = f32([[1, 1]])
    for condition, wanted in ((True, [[4, 6]]), (False, [[1, 1]])):
        feeds = {"c": np.asarray(condition), "x": x}
        assert run(tmp_path / "changed.onnx", feeds)["y"].tolist() == wanted
        tensors = {k: as_tensor(v) for k, v in feeds.items()}
        assert run_program(compile_model(changed), tensors)["y"].tolist() == wanted
        replaced = run_program(compile_model(model, ["k#2"]), tensors, {"k#2": torch.eye(2)})
        assert replaced["y"].tolist() == wanted
    before, after = ir.to_proto(model), ir.to_proto(changed)
    assert node_bytes(before.graph) == node_bytes(after.graph)


def test_integers_and_settings_are_not_trained() -> None:
    body = """net (float[2, 4] x) => (float[2, 2] y) {
        a = Reshape (x, shape)
        y = Clip (a, low)
    }"""
    assert not trainables(parse(body, weights={"shape": i64([2, 2]), "low": f32(0)}))


SUITE = os.environ.get("EDGEPACK_SUITE")


@pytest.mark.skipif(SUITE is None, reason="EDGEPACK_SUITE does not name the folder of real models")
def test_nodes_of_real_models_stay_byte_for_byte(tmp_path: Path) -> None:
    paths = sorted(Path(str(SUITE)).glob("*/model.onnx"))
    assert paths
    for path in paths:
        written = tmp_path / f"{path.parent.name}.onnx"
        save_model(scaled(load_model(path)), written)
        assert node_bytes(proto(path).graph) == node_bytes(proto(written).graph), path
