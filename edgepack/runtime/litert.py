"""Runs ``.tflite`` files with LiteRT's interpreter, or with tflite-runtime, its name on older devices.

A file may store an image in another order of axes than its ONNX model (NHWC for NCHW). Its metadata has the
order; a runner takes and returns arrays in the order of the ONNX model.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.errors import ConfigError, ModelError
from edgepack.ir.arrays import Array, Feeds
from edgepack.ir.inputs import InputSpec
from edgepack.ir.numerics import dequantize, quantize
from edgepack.ir.scheme import QuantParams, QuantType
from edgepack.runtime.quiet_stderr import without_notes
from edgepack.runtime.tflite_metadata import read_metadata

LIBRARIES = ("ai_edge_litert", "tflite_runtime")
"""Both have the same Interpreter; the first that is installed is used."""
LAYOUT = "edgepack.layout"
"""Metadata entry, JSON: for ``inputs`` and ``outputs``, by name, the ONNX axes in the file's order."""
DELEGATE = "DELEGATE"
"""The interpreter's name of a node for a partition that a delegate runs."""


def litert() -> Any:
    """The module with the Interpreter.

    Raises:
        ConfigError: neither library is installed.
    """
    return import_module(f"{_library()}.interpreter")


def litert_version() -> str | None:
    """Name and version of the installed library that runs ``.tflite`` files; ``None`` without one."""
    found = [library.replace("_", "-") for library in LIBRARIES if find_spec(library)]
    return f"{found[0]} {version(found[0])}" if found else None


def _library() -> str:
    for library in LIBRARIES:
        if find_spec(library):
            return library
    raise ConfigError(
        'no library that runs .tflite files is installed: pip install "edgepack[tflite]" (or '
        "ai-edge-litert, or on old devices tflite-runtime)"
    )


@dataclass(frozen=True, slots=True)
class Delegation:
    """How much of a model XNNPACK runs; the interpreter's own, slower kernels run the rest."""

    operators: int
    delegated: int
    partitions: int
    """Partitions that XNNPACK runs; tensors are handed over between them."""
    left: Mapping[str, int]
    """Operators that are not delegated, by type."""

    def as_dict(self) -> dict[str, Any]:
        """For a JSON report."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output tensor of the file."""

    name: str
    index: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """In the axis order of the ONNX model."""
    order: tuple[int, ...]
    """The axes of the ONNX model in the file's order."""
    params: QuantParams | None
    """Quantization parameters, where the file stores integers for real values."""

    def stored(self, array: Array) -> Array:
        """``array`` from the axis order of the ONNX model to that of the file."""
        turned = array.transpose(self.order)
        return np.ascontiguousarray(turned).reshape(turned.shape)  # ascontiguousarray gives a scalar one axis

    def native(self, array: Array) -> Array:
        """``array`` from the axis order of the file to that of the ONNX model."""
        return array.transpose(np.argsort(self.order))

    @property
    def spec(self) -> InputSpec:
        """The input or output for callers: float32 where it is quantized."""
        return InputSpec(self.name, self.dtype if self.params is None else np.dtype(np.float32), self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class LitertRunner:
    """An open ``.tflite``; see :class:`edgepack.runtime.runner.Runner`."""

    path: Path
    interpreter: Any
    entries: tuple[Port, ...]
    results: tuple[Port, ...]
    one_thread: bool

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """Names, types and shapes; all shapes are fixed."""
        return tuple(port.spec for port in self.entries)

    def prepare(self, feeds: Feeds) -> Feeds:
        """Quantize real values where the file takes integers; cast int64 to int32 where it takes that.

        Raises:
            ModelError: an input is missing, has another shape than the file's, or values that do not fit.
        """
        return {port.name: self._prepared(port, feeds) for port in self.entries}

    def _prepared(self, port: Port, feeds: Feeds) -> Array:
        if port.name not in feeds:
            raise ModelError(
                f"{self.path}: its input {port.name!r} is not among {', '.join(map(repr, feeds))}; was it "
                "made of another model?"
            )
        array = feeds[port.name]
        if array.shape != port.shape:
            raise ModelError(
                f"{self.path}: its input {port.name!r} has the fixed shape {list(port.shape)}, the sample's "
                f"is {list(array.shape)}; give samples of that shape, or build with other `dims:`"
            )
        if port.params is not None and np.issubdtype(array.dtype, np.floating):
            return port.stored(quantize(array, port.params))
        cast = array.astype(port.dtype, copy=False)
        if not np.array_equal(cast, array):
            raise ModelError(f"{self.path}: its input {port.name!r} is {port.dtype}, some values do not fit")
        return port.stored(cast)

    def call(self, prepared: Feeds) -> list[Array]:
        """Run inference in the types of the file."""
        for port in self.entries:
            self.interpreter.set_tensor(port.index, prepared[port.name])
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(port.index) for port in self.results]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run inference with real values for inputs and outputs."""
        found = self.call(self.prepare(feeds))
        return {
            port.name: port.native(array if port.params is None else dequantize(array, port.params))
            for port, array in zip(self.results, found, strict=True)
        }

    def delegation(self) -> Delegation:
        """The part of the model that XNNPACK runs."""
        return delegation(self.interpreter._get_ops_details())


def open_tflite(path: Path, threads: int, *, xnnpack: bool = True) -> LitertRunner:
    """Open ``path`` with ``threads`` threads, with XNNPACK as on a device unless ``xnnpack`` is false.

    Raises:
        ConfigError: no library for it is installed.
        ModelError: the file cannot be read, or the interpreter rejects it.
    """
    module = litert()
    kinds = module.OpResolverType
    kernels = kinds.AUTO if xnnpack else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        with without_notes():
            interpreter = module.Interpreter(
                str(path), num_threads=threads, experimental_op_resolver_type=kernels
            )
            interpreter.allocate_tensors()
    except Exception as error:  # ValueError, RuntimeError, or any error of an incompatible NumPy
        raise ModelError(f"{path}: {module.__name__} refuses it: {str(error).splitlines()[0]}") from error
    orders = _orders(path)
    entries = tuple(_port(found, orders["inputs"]) for found in interpreter.get_input_details())
    results = tuple(_port(found, orders["outputs"]) for found in interpreter.get_output_details())
    return LitertRunner(path, interpreter, entries, results, threads == 1)


def _orders(path: Path) -> dict[str, dict[str, list[int]]]:
    """Axis orders by name of input and output; empty for a file that edgepack did not write."""
    entry = read_metadata(path).get(LAYOUT)
    orders: dict[str, dict[str, list[int]]] = json.loads(entry) if entry else {"inputs": {}, "outputs": {}}
    return orders


def _port(details: Mapping[str, Any], orders: Mapping[str, Sequence[int]]) -> Port:
    name, dtype = details["name"], np.dtype(details["dtype"])
    stored = details["quantization_parameters"]
    params = None
    if np.issubdtype(dtype, np.integer) and len(stored["scales"]) == 1:
        scale, zero_point = np.float32(stored["scales"][0]), stored["zero_points"][0]
        params = QuantParams(QuantType(dtype.name), np.asarray(scale), np.asarray(zero_point, dtype))
    sizes = [int(size) for size in details["shape"]]
    order = tuple(orders.get(name, range(len(sizes))))
    shape = tuple(sizes[order.index(axis)] for axis in range(len(sizes)))
    return Port(name, int(details["index"]), dtype, shape, order, params)


def delegation(operators: Sequence[Mapping[str, Any]]) -> Delegation:
    """The delegated part, from the list of operators of the interpreter.

    It lists the operators of the file, then one node per delegated partition; operators in a partition stay
    in the list although they are not run. A partition has the operators between its inputs and its outputs.
    """
    own = [op for op in operators if op["op_name"] != DELEGATE]
    partitions = [op for op in operators if op["op_name"] == DELEGATE]
    producers = {int(tensor): index for index, op in enumerate(own) for tensor in op["outputs"]}
    taken: set[int] = set()
    for partition in partitions:
        given = {int(tensor) for tensor in partition["inputs"]}
        wanted = [int(tensor) for tensor in partition["outputs"]]
        while wanted:
            tensor = wanted.pop()
            index = producers.get(tensor)
            if tensor in given or index is None or index in taken:
                continue
            taken.add(index)
            wanted += [int(other) for other in own[index]["inputs"]]
    left = Counter(op["op_name"] for index, op in enumerate(own) if index not in taken)
    return Delegation(len(own), len(taken), len(partitions), dict(left.most_common()))
