"""The constants of a model by key: which are trainable, and how trained values are written back."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import onnx_ir as ir

from edgepack.ir.arrays import Array
from edgepack.ir.model import clone, name_of, walk_nodes


class Kind(StrEnum):
    """The role of a trainable constant."""

    WEIGHT = "weight"
    """Multiplied with activations; pruned and quantized."""
    BIAS = "bias"
    SCALE = "scale"
    """Scale or shift of a normalization."""
    TABLE = "table"
    """Embedding table."""


SLOTS: dict[str, dict[int, Kind]] = {
    "Conv": {1: Kind.WEIGHT, 2: Kind.BIAS},
    "ConvTranspose": {1: Kind.WEIGHT, 2: Kind.BIAS},
    "Gemm": {0: Kind.WEIGHT, 1: Kind.WEIGHT, 2: Kind.BIAS},
    "MatMul": {0: Kind.WEIGHT, 1: Kind.WEIGHT},
    "LSTM": {1: Kind.WEIGHT, 2: Kind.WEIGHT, 3: Kind.BIAS},
    "GRU": {1: Kind.WEIGHT, 2: Kind.WEIGHT, 3: Kind.BIAS},
    "RNN": {1: Kind.WEIGHT, 2: Kind.WEIGHT, 3: Kind.BIAS},
    "Gather": {0: Kind.TABLE},
    "BatchNormalization": {1: Kind.SCALE, 2: Kind.BIAS},
    "InstanceNormalization": {1: Kind.SCALE, 2: Kind.BIAS},
    "GroupNormalization": {1: Kind.SCALE, 2: Kind.BIAS},
    "LayerNormalization": {1: Kind.SCALE, 2: Kind.BIAS},
    "RMSNormalization": {1: Kind.SCALE},
    "PRelu": {1: Kind.SCALE},
}
"""The trainable constant inputs, by operator. Other constants, such as the exponent of a Pow, are not
trained."""
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})


@dataclass(frozen=True, slots=True)
class Trainable:
    """A trainable constant."""

    key: str
    kind: Kind
    op_type: str
    """Name of the first node that consumes it."""
    node: str
    shape: tuple[int, ...]
    output_axis: int
    """The output axis of a weight."""


def keys_of(model: ir.Model) -> dict[ir.Value, str]:
    """A key for each constant: its name, with a number where subgraphs repeat names."""
    seen: dict[str, int] = {}
    keys: dict[ir.Value, str] = {}
    for graph in model.graphs():
        values = list(graph.initializers.values())
        values += [n.outputs[0] for n in graph if n.op_type == "Constant" and n.domain in ("", "ai.onnx")]
        for value in values:
            name = name_of(value)
            seen[name] = seen.get(name, 0) + 1
            keys[value] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return keys


def source_of(value: ir.Value | None) -> ir.Value | None:
    """The initializer or Constant output behind ``value``, through Identity nodes; ``None`` if computed."""
    while value is not None:
        node = value.producer()
        if node is None:
            return value if value.is_initializer() else None
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("Identity", "Constant"):
            return None
        if node.op_type == "Constant":
            return value
        value = node.inputs[0]
    return None


def _slots(node: ir.Node) -> dict[int, Kind]:
    if node.domain not in ("", "ai.onnx"):
        return {}
    if node.op_type == "Add" and len(node.inputs) == 2:
        # A constant that is added to the output of a matrix product is its bias.
        makers = [v.producer() if v is not None else None for v in node.inputs]
        return {
            1 - i: Kind.BIAS for i, made in enumerate(makers) if made is not None and made.op_type in PRODUCTS
        }
    return SLOTS.get(node.op_type, {})


def trainables(model: ir.Model) -> dict[str, Trainable]:
    """The trainable float constants by key, in the order of their first consumers."""
    keys = keys_of(model)
    found: dict[str, Trainable] = {}
    for node in walk_nodes(model.graph):
        for slot, kind in _slots(node).items():
            source = source_of(node.inputs[slot]) if slot < len(node.inputs) else None
            tensor = _tensor(source)
            if source is None or tensor is None or tensor.dtype not in (ir.DataType.FLOAT,):
                continue
            shape = tuple(int(d) for d in tensor.shape.numpy())
            key = keys[source]
            axis = _output_axis(node, slot) % max(len(shape), 1)
            found.setdefault(key, Trainable(key, kind, node.op_type, node.name or "", shape, axis))
    return found


def _output_axis(node: ir.Node, slot: int) -> int:
    if node.op_type == "MatMul":
        return -1 if slot == 1 else -2
    if node.op_type == "Gemm" and slot < 2:
        turned = bool(node.attributes.get_int("transB" if slot == 1 else "transA", 0))
        return int(turned != (slot == 1))
    return 1 if node.op_type in ("ConvTranspose", "LSTM", "GRU", "RNN") else 0


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    if value is None:
        return None
    if value.producer() is None:
        return value.const_value
    return ir.convenience.get_const_tensor(value)


def array_of(value: ir.Value) -> Array:
    """The array of a constant that :func:`keys_of` lists."""
    tensor = _tensor(value)
    assert tensor is not None, f"{value.name} has no content"
    return tensor.numpy()


def with_weights(model: ir.Model, content: Mapping[str, Array]) -> ir.Model:
    """A copy of ``model`` with new contents of the constants in ``content``, by key.

    Given: ``y = Conv(x, w)``, ``w`` initializer or Constant. Result: the same nodes, names and types.
    """
    changed = clone(model)
    for value, key in keys_of(changed).items():
        if key not in content:
            continue
        old = _tensor(value)
        assert old is not None
        array = np.ascontiguousarray(content[key], old.dtype.numpy())
        assert array.shape == tuple(old.shape.numpy()), f"{key}: {array.shape} is not {old.shape}"
        new = ir.tensor(array, name=old.name)
        node = value.producer()
        if node is None:
            value.const_value = new
        else:
            _set_constant_node(node, array, new)
    return changed


def _set_constant_node(node: ir.Node, array: Array, tensor: ir.TensorProtocol) -> None:
    (attribute,) = node.attributes.values()
    made: ir.Attr
    if attribute.type == ir.AttributeType.FLOAT:
        made = ir.AttrFloat32(attribute.name, float(array))
    elif attribute.type == ir.AttributeType.FLOATS:
        made = ir.AttrFloat32s(attribute.name, array.tolist())
    else:
        made = ir.AttrTensor(attribute.name, tensor)
    node.attributes[attribute.name] = made
    if node.outputs[0].const_value is not None:
        node.outputs[0].const_value = tensor
