"""Reading and writing ONNX models.

- Tensors of a loaded model may be views into its files, so a model is never saved over its own source file.
- External data stay on disk, memory-mapped, until they are read."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from edgepack.errors import ExportError, ModelError
from edgepack.ir.model import clone, walk_nodes
from edgepack.ir.sparse import load_dense, undefined_input

EXTERNAL_BYTES = 256_000_000
"""A model with more bytes of weights gets an external data file: onnxruntime maps such a file, but holds
weights inside of the model twice while it loads them. A protobuf file is limited to 2 GiB in any case."""
_EXTERNAL_TENSOR_BYTES = 1024


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
        ModelError: the file is missing, not a model, has a cycle, or its external data are missing or too
        short.
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
        cause = _root(error)
        if isinstance(cause, NotImplementedError):
            raise ModelError(
                f"{path}: an input or output has an unsupported type ({str(cause).partition('.')[0]}). "
                "Exports of scikit-learn have a map behind a ZipMap: export with options={'zipmap': False}"
            ) from error
        raise ModelError(f"{path}: is not an ONNX model, or is cut short ({size} bytes): {error}") from error
    if undefined_input(model) is not None:
        model = _with_sparse_initializers(path)
    if not model.ir_version or not model.graph.opset_imports:
        raise ModelError(
            f"{path}: is not an ONNX model, or is cut short: it states no IR version or no opset"
        )
    for tensor in _external_tensors(model):
        _check_external(path, tensor)
    try:
        model.graph.sort()  # runtimes accept nodes in any order, and converters to float16 write such files
    except ValueError as error:
        raise ModelError(f"{path}: its nodes depend on each other in a circle; export it again") from error
    return model


def _root(error: BaseException) -> BaseException:
    """The error that all others of the chain were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _with_sparse_initializers(path: Path) -> ir.Model:
    """The model with its sparse initializers made dense, where these define what is missing.

    Raises:
        ModelError: a sparse initializer is broken, or a node consumes what nothing defines.
    """
    try:
        model = load_dense(path)
    except (DecodeError, ir.serde.SerdeError, ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(f"{path}: {error}") from error
    missing = undefined_input(model)
    if missing is not None:
        raise ModelError(
            f"{path}: node {missing[0]!r} consumes {missing[1]!r}, which no node, input or initializer "
            "defines; export the model again"
        )
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
    """Write ``model`` to ``path`` and run the ONNX checker on the result; ``model`` is not changed.

    Args:
        model: the model.
        path: the file; external data go to ``<path>.data``.
        external: write weights to an external file; by default only if they exceed :data:`EXTERNAL_BYTES`.
        check: run the checker; off for temporary models, whose extra outputs may have no known rank.

    Raises:
        ExportError: ``path`` is a file that the model itself reads, the checker refuses the model, or it
            cannot be written; no partial file remains.
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
            # By path: it is the only way for a model of more than 2 GiB, and works for smaller ones too.
            if check:
                onnx.checker.check_model(str(draft))
            if (written := draft.with_name(data.name)).exists():
                written.replace(data)
            draft.replace(path)
    except (onnx.checker.ValidationError, ir.serde.SerdeError, OSError, EncodeError, ValueError) as error:
        raise ExportError(f"{path}: the model cannot be written: {error}") from error


def _in_memory(model: ir.Model) -> ir.Model:
    """A copy that needs no file: external tensors are loaded, Constant nodes become initializers."""
    model = clone(model)
    lift = ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)
    return ir.external_data.load_to_model(lift(model).model)


def model_bytes(path: Path) -> int:
    """Bytes on disk of a model file and all external data files that it names."""
    files = {Path(path).resolve()}
    files |= {Path(t.path).resolve() for t in _external_tensors(load_model(path))}
    return sum(file.stat().st_size for file in files)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all tensors of a model; no data are read."""
    return sum(t.nbytes for t in tensors(model))
