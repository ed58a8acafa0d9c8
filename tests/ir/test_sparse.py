"""Sparse initializers become dense, and what cannot be read is told by its reason."""

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper as nh
import pytest
from onnx import TensorProto
from support.onnx_models import Array, run

from edgepack.errors import ModelError
from edgepack.ir.files import load_model

DENSE = np.zeros((4, 3), np.float32)
DENSE[1, 2], DENSE[3, 0] = 2.5, -1.0


def sparse(indices: Array, values: Array | None = None, name: str = "w") -> onnx.SparseTensorProto:
    values = np.asarray([2.5, -1.0], np.float32) if values is None else values
    return onnx.helper.make_sparse_tensor(nh.from_array(values, name), nh.from_array(indices), [4, 3])


def write(path: Path, constant: onnx.SparseTensorProto, *, in_body: bool = False) -> Path:
    x = onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])
    y = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], sparse_initializer=[constant])
    if in_body:
        inner = [onnx.helper.make_node("MatMul", ["x", "w"], ["z"], "product")]
        z = onnx.helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 3])
        body = onnx.helper.make_graph(inner, "b", [], [z], sparse_initializer=[constant])
        condition = onnx.helper.make_tensor_value_info("c", TensorProto.BOOL, [])
        nodes = [onnx.helper.make_node("If", ["c"], ["y"], "if", then_branch=body, else_branch=body)]
        graph = onnx.helper.make_graph(nodes, "g", [x, condition], [y])
    imports = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("in_body", [False, True])
@pytest.mark.parametrize("indices", [[5, 9], [[1, 2], [3, 0]]], ids=["linear", "coordinates"])
def test_a_sparse_initializer_is_read_as_a_dense_one(
    indices: list[object], in_body: bool, tmp_path: Path
) -> None:
    model = load_model(write(tmp_path / "m.onnx", sparse(np.asarray(indices, np.int64)), in_body=in_body))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    feeds = {"x": x, **({"c": np.asarray(True)} if in_body else {})}
    np.testing.assert_allclose(run(model, feeds)["y"], x @ DENSE)


def test_indices_outside_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"m\.onnx: sparse initializer 'w' of shape \[4, 3\]"):
        load_model(write(tmp_path / "m.onnx", sparse(np.asarray([5, 12], np.int64))))


def test_a_value_that_nothing_defines_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", sparse(np.asarray([5, 9], np.int64), name="other"))
    with pytest.raises(ModelError, match="node 'product' consumes 'w', which no node"):
        load_model(path)


def test_a_map_is_told_with_what_to_do(tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    floats = onnx.helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    maps = onnx.helper.make_sequence_type_proto(onnx.helper.make_map_type_proto(TensorProto.INT64, floats))
    node = onnx.helper.make_node("ZipMap", ["x"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    graph = onnx.helper.make_graph([node], "g", [x], [onnx.helper.make_value_info("z", maps)])
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("ai.onnx.ml", 3)]
    (tmp_path / "m.onnx").write_bytes(
        onnx.helper.make_model(graph, opset_imports=imports).SerializeToString()
    )
    with pytest.raises(ModelError, match=r"Map types are not supported.*zipmap"):
        load_model(tmp_path / "m.onnx")
