"""The bytes of a ``.tflite``, read by the code that flatc generates."""

import numpy as np
import pytest
import tflite

from edgepack.export.tflite.flatbuffer import ALIGNMENT, Graph, Operator, Quant, Tensor, serialize
from edgepack.export.tflite.schema import OPS

INT8 = np.dtype(np.int8)


def _graph(**options: float) -> Graph:
    scale = Quant(np.asarray([0.5], np.float32), np.asarray([3]))
    graph = Graph()
    x = graph.add(Tensor("x", (1, 3), INT8, scale))
    odd = [graph.add(Tensor(f"w{n}", (1, n), INT8, scale, np.full((1, n), n, np.int8))) for n in (1, 3, 5)]
    y = graph.add(Tensor("y", (1, 3), INT8, scale))
    graph.operators.append(Operator("ADD", (x, odd[1]), (y,), 2, options))
    graph.operators.append(Operator("SIGN", (y,), (graph.add(Tensor("z", (1, 3), INT8, scale)),), 2, {}))
    graph.inputs, graph.outputs = [x], [len(graph.tensors) - 1]
    return graph


def test_constants_are_aligned_for_memory_mapping() -> None:
    """flatc's code for Python alone does not align them."""
    content = bytes(serialize(_graph(), "d", {"note": b"ab"}))
    model = tflite.Model.GetRootAs(content)
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    assert buffers[0].DataIsNone() and len(buffers) == 5
    for buffer in buffers[1:]:
        assert buffer._tab.Vector(buffer._tab.Offset(4)) % ALIGNMENT == 0
    assert [bytes(b.DataAsNumpy()) for b in buffers[1:]] == [b"\1", b"\3" * 3, b"\5" * 5, b"ab"]


def test_what_is_written_is_what_the_schema_reads() -> None:
    content = bytes(serialize(_graph(fused_activation_function=1), "d", {"note": b"ab"}))
    assert tflite.Model.ModelBufferHasIdentifier(content, 0)
    model = tflite.Model.GetRootAs(content)
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    assert [(c.BuiltinCode(), c.Version()) for c in codes] == [
        (tflite.BuiltinOperator.ADD, 2),
        (tflite.BuiltinOperator.SIGN, 2),
    ]
    # Runtimes older than the second field read eight bits.
    assert [c.DeprecatedBuiltinCode() for c in codes] == [0, 127]
    part = model.Subgraphs(0)
    add, sign = part.Operators(0), part.Operators(1)
    assert add.BuiltinOptionsType() == tflite.BuiltinOptions.AddOptions
    assert sign.BuiltinOptions() is None
    options = tflite.AddOptions()
    options.Init(add.BuiltinOptions().Bytes, add.BuiltinOptions().Pos)
    assert options.FusedActivationFunction() == tflite.ActivationFunctionType.RELU
    quant = part.Tensors(0).Quantization()
    assert (quant.ScaleAsNumpy().tolist(), quant.ZeroPointAsNumpy().tolist()) == ([0.5], [3])
    signature = model.SignatureDefs(0)
    assert signature.Inputs(0).Name() == b"x" and signature.Outputs(0).Name() == b"z"


def test_an_unknown_option_of_an_operator_is_refused() -> None:
    with pytest.raises(AttributeError, match="AddOptionsAddAxis"):
        serialize(_graph(axis=1), "d", {})


@pytest.mark.parametrize("name", OPS)
def test_operators_and_their_tables_are_in_the_schema(name: str) -> None:
    assert hasattr(tflite.BuiltinOperator, name)
    assert not OPS[name].options or hasattr(tflite.BuiltinOptions, OPS[name].options)
