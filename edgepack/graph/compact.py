"""Compaction: remove from a graph what a runtime or shape inference can derive again.

In a network of 20,000 parameters, a quarter of the int8 file is names, default attributes, inferable types
and scales that are products of two others. Removing them changes no result.
"""

import itertools
import re
import string
from collections.abc import Collection, Iterator

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common

from edgepack.graph.tied_embeddings import as_transposes
from edgepack.ir.files import weight_bytes
from edgepack.ir.model import clone, constant, walk_nodes

Pair = tuple[ir.Value, ir.Value]

LEAST_SHARE = 0.02
"""Least bytes of bias scales that are replaced by a Mul: the runtime computes each product at load time, in
0.1 ms."""
LEAST_CHANNELS = 12
"""A Mul of two stored scales takes about 40 bytes, as much as ten scales."""
_REPLACES = re.compile(r"(_q)?(_\d+)?$")
"""Suffixes of a constant's name: its int8 values, or a constant that replaces it, see
:class:`edgepack.quantization.rewrite.emit.Emitter`."""
_HEAD = string.ascii_letters
_TAIL = string.ascii_letters + string.digits
_UNNAMED = "unk__"
"""Prefix of the dimension names that shape inference generates."""
_SPATIAL_DEFAULTS = {"dilations": 1, "strides": 1, "pads": 0}
"""Defaults of these attributes of convolutions and poolings, for every dimension."""
_WINDOWED = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "ConvInteger"})


def compact(model: ir.Model, kept_names: Collection[str]) -> ir.Model:
    """A copy of ``model`` that computes the same bits and takes fewer bytes.

    ``kept_names`` are the names of values that ranges, overrides and reports refer to: those of the float
    model. They are kept, and so are the names of nodes, inputs and outputs. Other initializers, scales and
    values that quantization has added get names of one or two letters. If ``kept_names`` contains the names
    of constants, the int8 initializer of a constant gets the constant's name.
    """
    made = clone(model)
    as_transposes(made)
    _derive_bias_scales(made)
    _drop_defaults(made)
    _drop_inferable_types(made)
    _give_names_back(made.graph, kept_names)
    _shorten_names(made.graph, kept_names)
    return made


def names_of(model: ir.Model, *, constants: bool = False) -> frozenset[str]:
    """The names of all activations of ``model`` (inputs, node outputs), on request of its ``constants``."""
    stored = model.graph.initializers.values() if constants else ()
    values = (*model.graph.inputs, *_outputs(model.graph), *stored)
    return frozenset(v.name for v in values if v.name)


def _derive_bias_scales(model: ir.Model) -> None:
    """Compute the scale of an int32 bias as the product of two stored scales.

    Given: ``DQ(b int32, stored)``, where ``stored`` equals ``xs * ws`` bit for bit for a node that consumes
    ``DQ(x, xs)`` and ``DQ(w, ws)``. Result: ``DQ(b int32, Mul(xs, ws))``. Every runtime folds the Mul when it
    loads the file, before it matches QDQ patterns.
    """
    graph = model.graph
    derivable = list(_derivable(graph))
    if sum(4 * count for _, _, count in derivable) < LEAST_SHARE * weight_bytes(model):
        return
    made: dict[Pair, ir.Value] = {}
    for node, pair, _ in derivable:
        if pair not in made:
            product = ir.node("Mul", pair, name="")
            product.outputs[0].name = f"{pair[0].name}*{pair[1].name}"
            graph.insert_before(node, product)
            made[pair] = product.outputs[0]
        node.replace_input_with(1, made[pair])
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]


def _derivable(graph: ir.Graph) -> Iterator[tuple[ir.Node, Pair, int]]:
    """Each DequantizeLinear of a bias, the two scales whose product its scale is, and their number."""
    factors = dict(_products(graph))
    for node in graph:
        scale = constant(node.inputs[1]) if node.op_type == "DequantizeLinear" else None
        stored = constant(node.inputs[0]) if scale is not None else None
        if scale is None or stored is None or stored.dtype != np.int32 or scale.size < LEAST_CHANNELS:
            continue
        pair = factors.get((scale.shape, scale.tobytes()))
        if pair is not None:
            yield node, pair, scale.size


def _products(graph: ir.Graph) -> Iterator[tuple[tuple[tuple[int, ...], bytes], Pair]]:
    """Shape and bytes of each product of an activation scale and a weight scale, with the two scales."""
    for node in graph:
        restored = [v.producer() if v is not None else None for v in node.inputs[:2]]
        scales = [r.inputs[1] for r in restored if r is not None and r.op_type == "DequantizeLinear"]
        if len(scales) < 2 or scales[0] is None or scales[1] is None:
            continue
        left, right = constant(scales[0]), constant(scales[1])
        if left is not None and right is not None and left.dtype == right.dtype == np.float32:
            product = np.asarray(left * right, np.float32)
            yield (product.shape, product.tobytes()), (scales[0], scales[1])


def _drop_defaults(model: ir.Model) -> None:
    """Remove attributes that state their default, and debugging metadata of exporters."""
    for node in walk_nodes(model.graph):
        node.doc_string = None
        node.metadata_props.clear()
        for name, attribute in list(node.attributes.items()):
            if not attribute.is_ref() and _is_default(node, attribute, model.opset_imports):
                node.attributes.pop(name)


def _is_default(node: ir.Node, attribute: ir.Attr, opsets: dict[str, int]) -> bool:
    if node.op_type in _WINDOWED and node.domain == "" and attribute.name in _SPATIAL_DEFAULTS:
        return set(attribute.as_ints()) == {_SPATIAL_DEFAULTS[attribute.name]}
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets[node.domain], node.domain)
        default = schema.attributes[attribute.name].default_value
    except (onnx.defs.SchemaError, KeyError):
        return False  # an operator of another domain: its defaults are not known here
    return bool(default.type) and default == ir.to_proto(attribute)


def _drop_inferable_types(model: ir.Model) -> None:
    """Remove types and shapes of inner values that shape inference finds from those of the inputs."""
    values = [v for node in model.graph for v in node.outputs if not v.is_graph_output()]
    stated = {v: (v.type, v.shape) for v in values}
    for value in values:
        value.type = value.shape = None
        value.metadata_props.clear()
    ir.passes.common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    for value, (kind, shape) in stated.items():
        inferable = kind is None or (kind == value.type and _says(value.shape, shape))
        value.type, value.shape = (None, None) if inferable else (kind, shape)
    for value in model.graph.initializers.values():
        if not value.is_graph_input() and not value.is_graph_output():
            value.type = value.shape = None


def _says(inferred: ir.Shape | None, stated: ir.Shape | None) -> bool:
    """Whether ``inferred`` is at least as specific as ``stated``."""
    if stated is None:
        return True
    if inferred is None or len(inferred) != len(stated):
        return False
    return all(_unknown(b) or a == b for a, b in zip(inferred, stated, strict=True))


def _unknown(dimension: int | ir.SymbolicDim) -> bool:
    return not isinstance(dimension, int) and (dimension.value or _UNNAMED).startswith(_UNNAMED)


def _give_names_back(graph: ir.Graph, kept_names: Collection[str]) -> None:
    """Give a value that replaced a constant its name, unless the file still has that constant.

    Given: ``Conv(x, DQ(w_q int8, scale), b_1)``; ``w`` and ``b`` are in ``kept_names`` and removed. Result:
    ``Conv(x, DQ(w int8, scale), b)``.
    """
    graphs = (graph, *graph.subgraphs())
    taken = {v.name for g in graphs for v in (*g.inputs, *g.initializers.values(), *_outputs(g))}
    for value in list(graph.initializers.values()):
        name = value.name or ""
        own = _REPLACES.sub("", name)
        if name not in kept_names and own in kept_names and own not in taken:
            value.name = own
            taken.add(own)


def _shorten_names(graph: ir.Graph, kept_names: Collection[str]) -> None:
    """Give short names to all values outside of ``kept_names``, the shortest to those used most."""
    helpers = [
        v
        for v in (*graph.initializers.values(), *(v for node in graph for v in node.outputs))
        if v.name and not v.is_graph_input() and not v.is_graph_output()
        if v.name not in kept_names
    ]
    inner = (v for g in graph.subgraphs() for v in (*g.inputs, *g.initializers.values(), *_outputs(g)))
    renamed = set(helpers)
    known = (*graph.inputs, *graph.initializers.values(), *_outputs(graph), *inner)
    kept = {v.name for v in known if v not in renamed}
    # Two passes: a new name must not equal the name of a value that is renamed later.
    for number, value in enumerate(helpers):
        value.name = f"\0{number}"
    # A new name must not equal a removed value of the float model: the file would seem to still contain it.
    fresh = (name for name in _short_names() if name not in kept and name not in kept_names)
    for value in sorted(helpers, key=lambda v: -len(v.uses())):
        value.name = next(fresh)


def _outputs(graph: ir.Graph) -> Iterator[ir.Value]:
    return (v for node in graph for v in node.outputs)


def _short_names() -> Iterator[str]:
    """``a``, ``b`` ... ``Z``, ``aa``, ``ab`` ... ``a0`` ..."""
    for length in itertools.count():
        for letters in itertools.product(_HEAD, *[_TAIL] * length):
            yield "".join(letters)
