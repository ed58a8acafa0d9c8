"""ONNX models as ``onnx_ir`` models: reading, writing, constants, names, identity.

Every pitfall of the IR is dealt with here, once:

- a new ``ir.Value`` takes neither type nor shape from its ``const_value``: :func:`new_initializer` sets all;
- tensors of a loaded model may be views into its files, so a model is never saved over its own source;
- an initializer that is also a graph input is a default, not an input that a caller must feed;
- external data stay on disk, mapped, until somebody reads them.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from edgepack.errors import ExportError, ModelError

if TYPE_CHECKING:
    from edgepack.data.samples import InputSpec

Array = npt.NDArray[Any]

EXTERNAL_BYTES = 256_000_000
"""Above this many bytes of weights a model gets a data file beside it: onnxruntime maps such a file, where it
keeps weights inside of the model twice while it loads them. One protobuf ends at 2 GiB anyway."""
LARGE_BYTES = 1_000_000_000
"""A model with more bytes of weights is large: nothing may hold all of its weights in memory."""
LAZY_BYTES = 16 << 20
"""A computed tensor larger than this is computed when it is read and not kept."""
_EXTERNAL_TENSOR_BYTES = 1024
_CHUNK_BYTES = 16 << 20
_QUANTIZED_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "MatMulBnb4",
        "GatherBlockQuantized",
        "QAttention",
        "QGemm",
    }
)


def load_model(path: Path) -> ir.Model:
    """The model in the file ``path``; external data stay on disk and are mapped when read.

    Raises:
        ModelError: no such file, not a model, a circle in it, or external data missing or too short.
    """
    path = Path(path).absolute()
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if path.is_dir():
        raise ModelError(f"{path}: is a folder, an .onnx file was expected")
    if size == 0:
        raise ModelError(f"{path}: is empty (0 bytes); export or download it again")
    try:
        model = ir.load(path, format="protobuf")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    except (DecodeError, ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path}: is not an ONNX model, or is cut short ({size} bytes): {error}") from error
    if not model.ir_version or not model.graph.opset_imports:
        raise ModelError(
            f"{path}: is not an ONNX model, or is cut short: it states no IR version or no opset"
        )
    for tensor in _external_tensors(model):
        _check_external(path, tensor)
    try:
        model.graph.sort()  # runtimes load nodes in any order, and converters to float16 write such files
    except ValueError as error:
        raise ModelError(f"{path}: its nodes depend on each other in a circle; export it again") from error
    return model


def tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """All tensors: initializers and attributes, in all graphs and functions."""
    for graph in model.graphs():
        yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)
    for node in _all_nodes(model):
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()
            elif attribute.type == ir.AttributeType.TENSORS:
                yield from attribute.as_tensors()


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from walk_nodes(model.graph)
    for function in model.functions.values():
        yield from walk_nodes(function)


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    return (t for t in tensors(model) if isinstance(t, ir.ExternalTensor))


def external_files(path: Path) -> list[str]:
    """Names of the files beside the model ``path`` that hold its weights.

    Raises:
        ModelError: see :func:`load_model`.
    """
    return sorted({str(tensor.location) for tensor in _external_tensors(load_model(path))})


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    file = Path(tensor.path)
    who = f"{path}: tensor {tensor.name!r}"
    if not file.resolve().is_relative_to(path.parent.resolve()) and not file.is_symlink():
        raise ModelError(f"{who} has its data in {tensor.location}, outside of the model's folder")
    if not file.is_file():
        raise ModelError(f"{who} has its data in {file}, which does not exist; keep the two files together")
    need = (tensor.offset or 0) + tensor.nbytes
    have = file.stat().st_size
    if tensor.length is not None and tensor.length != tensor.nbytes:
        raise ModelError(
            f"{who} of {tensor.nbytes} bytes has {tensor.length} bytes in {file}; export the model again"
        )
    if have < need:
        raise ModelError(
            f"{who} needs {need} bytes of {file}, which has {have}: the file is cut short, copy it again"
        )


def require_float(model: ir.Model, path: Path) -> None:
    """Refuse a model that is quantized already.

    Raises:
        ModelError: naming the first quantized node.
    """
    for node in _all_nodes(model):
        if node.op_type in _QUANTIZED_OPS or node.op_type.startswith("QLinear"):
            raise ModelError(
                f"{path}: is quantized already: node {node.name!r} is a {node.op_type}; "
                "pass the float model that it was made from"
            )


def save_model(model: ir.Model, path: Path, *, external: bool | None = None, check: bool = True) -> None:
    """Write ``model`` to ``path`` and check the result with the ONNX checker; ``model`` stays as it is.

    Args:
        model: the model.
        path: the file; with external data also ``<path>.data``.
        external: write weights to a file beside; by default only where they exceed :data:`EXTERNAL_BYTES`.
        check: run the checker; off for scratch models, whose extra outputs may have no known rank.

    Raises:
        ExportError: ``path`` is a file that the model itself reads, the checker refuses the model, or the
            disk does; nothing half written is left then.
    """
    path = Path(path).absolute()
    data = path.with_name(path.name + ".data")
    sources = {Path(t.path).resolve() for t in _external_tensors(model)}
    if sources & {path.resolve(), data.resolve()}:
        raise ExportError(f"{path}: the model reads its weights from there; save under another name")
    if external is None:
        external = weight_bytes(model) > EXTERNAL_BYTES
    if not external and sources:
        model = _in_memory(model)
    try:
        with tempfile.TemporaryDirectory(prefix=".save-", dir=path.parent) as folder:
            draft = Path(folder) / path.name
            if external:
                ir.save(
                    model,
                    draft,
                    format="protobuf",
                    external_data=data.name,
                    size_threshold_bytes=_EXTERNAL_TENSOR_BYTES,
                )
            else:
                ir.save(model, draft, format="protobuf")
            # By path: a model of more than 2 GiB has no other way, and smaller ones need no second one.
            if check:
                onnx.checker.check_model(str(draft))
            if (written := draft.with_name(data.name)).exists():
                written.replace(data)
            draft.replace(path)
    except (onnx.checker.ValidationError, ir.serde.SerdeError, OSError, EncodeError, ValueError) as error:
        raise ExportError(f"{path}: the model cannot be written: {error}") from error


def _in_memory(model: ir.Model) -> ir.Model:
    """A copy that needs no file: external tensors are read, those of Constant nodes become initializers."""
    model = clone(model)
    lift = ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)
    return ir.external_data.load_to_model(lift(model).model)


def model_bytes(path: Path) -> int:
    """Bytes on disk of a model file with all external data files that it names."""
    files = {Path(path).resolve()}
    files |= {Path(t.path).resolve() for t in _external_tensors(load_model(path))}
    return sum(file.stat().st_size for file in files)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all tensors of a model; none is read."""
    return sum(t.nbytes for t in tensors(model))


def clone(model: ir.Model) -> ir.Model:
    """An independent copy; tensors, which nobody changes in place, are shared."""
    return model.clone()


def input_specs(model: ir.Model) -> tuple["InputSpec", ...]:
    """What a caller must feed: graph inputs that are not initializers.

    Raises:
        ModelError: an input that is not a tensor.
    """
    from edgepack.data.samples import InputSpec  # noqa: PLC0415  # data.py reads files, this module does not

    specs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if not isinstance(value.type, ir.TensorType):
            raise ModelError(f"input {value.name!r} is {value.type}, only tensors are supported")
        shape = None
        if value.shape is not None:
            shape = tuple(_dimension(d) for d in value.shape)
        specs.append(InputSpec(name_of(value), np.dtype(value.type.dtype.numpy()), shape))
    return tuple(specs)


def _dimension(size: int | ir.SymbolicDim) -> int | str | None:
    """A fixed size, the name of a free one, or ``None``; some exporters write -1 for a free one."""
    if isinstance(size, int):
        return size if size >= 0 else None
    return size.value


def name_of(value: ir.Value) -> str:
    """The value's name; values in a loaded model always have one."""
    if value.name is None:
        raise ModelError(f"a value without a name: output of {value.producer()}")
    return value.name


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node, seen through Identity; ``None`` if not constant.

    An initializer that is also a graph input is not constant: a caller may feed something else.
    """
    while value is not None:
        node = value.producer()
        if node is None:
            constant_here = value.is_initializer() and not value.is_graph_input()
            return value.const_value if constant_here else None
        if node.domain != "" or node.op_type not in ("Identity", "Constant"):
            return None
        if node.op_type == "Constant":
            return ir.convenience.get_const_tensor(value)
        value = node.inputs[0]
    return None


def constant(value: ir.Value | None) -> Array | None:
    """The array of a constant value (see :func:`constant_tensor`), or ``None``. Do not write to it."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(dims(tensor))


def dims(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The dimensions of a tensor, which are always known."""
    return tuple(d for d in tensor.shape if isinstance(d, int))


def fresh_name(graph: ir.Graph, base: str) -> str:
    """``base``, or ``base_1``, ``base_2``... : the first that no value in ``graph`` or inside it has.

    Give the model's main graph: a subgraph does not know the graph around it.
    """
    taken: set[str | None] = set()
    for inner in (graph, *graph.subgraphs()):
        taken.update(v.name for v in inner.inputs)
        taken.update(inner.initializers)
        taken.update(v.name for node in inner for v in node.outputs)
    name, number = base, 0
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name


def new_initializer(graph: ir.Graph, name: str, content: Array | ir.TensorProtocol) -> ir.Value:
    """A constant in the main ``graph``, named ``name`` or, if that is taken, a name made from it."""
    name = fresh_name(graph, name)
    # NumPy makes scalars of arrays without dimensions at every turn, so those are welcome too.
    tensor: ir.TensorProtocol
    if isinstance(content, np.ndarray | np.generic):
        tensor = ir.tensor(np.asarray(content), name=name)
    else:
        tensor = content
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=_shape(tensor), const_value=tensor)
    graph.register_initializer(value)
    return value


def set_constant(model: ir.Model, name: str, content: Array) -> None:
    """Replace the content of the initializer ``name``, for all its users; type and shape may change.

    Raises:
        ModelError: no such initializer.
    """
    for graph in model.graphs():
        value = graph.initializers.get(name)
        if value is not None:
            tensor = ir.tensor(content, name=name)
            value.const_value, value.shape = tensor, _shape(tensor)
            value.type = ir.TensorType(tensor.dtype)
            return
    raise ModelError(f"the model has no initializer {name!r}")


def computed(source: ir.TensorProtocol, function: Callable[[Array], Array]) -> ir.TensorProtocol:
    """``function`` of a tensor, same shape and type: at once, or for a large tensor whenever it is read."""
    dtype = source.dtype.numpy()

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(function(source.numpy()), dtype))

    if source.nbytes <= LAZY_BYTES:
        return compute()
    return ir.LazyTensor(compute, dtype=source.dtype, shape=_shape(source), name=source.name)


def walk_nodes(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """All nodes of ``graph`` in order, those of subgraphs included, each before what it contains."""
    return iter(ir.traversal.RecursiveGraphIterator(graph))


def captured_values(graph: ir.Graph) -> set[str]:
    """Names of the values of ``graph`` that bodies of If, Loop or Scan inside it use."""
    captured = set()
    for inner in graph.subgraphs():
        used = [v for node in inner for v in node.inputs if v is not None]
        captured |= {name_of(v) for v in [*used, *inner.outputs] if v.graph is graph}
    return captured


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The node that alone uses ``value``, once, in the same graph, when the value is no graph output."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    ((node, _),) = uses
    return node if node.graph is value.graph else None


def fingerprint(model: ir.Model) -> str:
    """SHA-256 of what the model computes: operators, attributes, wiring, value names and weights.

    Node names, doc strings and metadata do not count; value names do, since ranges are stored under them.
    Reads weights one by one.
    """
    digest = hashlib.sha256()
    _put(digest, *(f"{domain}:{version}" for domain, version in sorted(model.graph.opset_imports.items())))
    _hash_graph(digest, model.graph)
    for identifier in sorted(model.functions):
        function = model.functions[identifier]
        _put(digest, "function", *map(str, identifier), *sorted(function.attributes))
        _put(digest, *(v.name for v in function.inputs), ">", *(v.name for v in function.outputs))
        for node in function:
            _hash_node(digest, node)
    return digest.hexdigest()


def _put(digest: "hashlib._Hash", *words: str | None) -> None:
    """Words with their lengths, so that no two lists of words give the same bytes."""
    for word in words:
        raw = b"-" if word is None else word.encode()
        digest.update(b"%d:" % len(raw) + raw)


def _hash_graph(digest: "hashlib._Hash", graph: ir.Graph) -> None:
    _put(digest, "graph")
    for value in (*graph.inputs, *graph.outputs):
        _put(digest, value.name, str(value.type), str(value.shape))
    for name in sorted(graph.initializers):
        tensor = graph.initializers[name].const_value
        _put(digest, "weight", name)
        if tensor is not None:
            _hash_tensor(digest, tensor)
    for node in graph:
        _hash_node(digest, node)


def _hash_node(digest: "hashlib._Hash", node: ir.Node) -> None:
    _put(digest, "node", node.domain, node.op_type, node.overload)
    _put(digest, *(None if v is None else v.name for v in node.inputs), ">", *(v.name for v in node.outputs))
    for name in sorted(node.attributes):
        attribute = node.attributes[name]
        _put(digest, name, str(attribute.type))
        if attribute.is_ref():
            _put(digest, "ref", attribute.ref_attr_name)
        elif attribute.type == ir.AttributeType.GRAPH:
            _hash_graph(digest, attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                _hash_graph(digest, graph)
        elif attribute.type == ir.AttributeType.TENSOR:
            _hash_tensor(digest, attribute.as_tensor())
        else:
            _put(digest, repr(attribute.value))


def _hash_tensor(digest: "hashlib._Hash", tensor: ir.TensorProtocol) -> None:
    _put(digest, str(tensor.dtype), str(tuple(tensor.shape)))
    digest.update(tensor_digest(tensor))


def tensor_digest(tensor: ir.TensorProtocol) -> bytes:
    """SHA-256 of a tensor's content, read in pieces where it is mapped from a file."""
    digest = hashlib.sha256()
    if tensor.dtype == ir.DataType.STRING:
        for text in np.asarray(tensor.numpy()).ravel():
            _put(digest, text.decode() if isinstance(text, bytes) else str(text))
        return digest.digest()
    raw = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    for start in range(0, raw.size, _CHUNK_BYTES):
        digest.update(raw[start : start + _CHUNK_BYTES].data)
    return digest.digest()
