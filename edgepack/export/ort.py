"""The ``.ort`` artifact: onnxruntime's format for its reduced builds on phones and boards."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from edgepack.config.target import Runtime
from edgepack.errors import ExportError, ModelError
from edgepack.evaluation.check import compare_outputs
from edgepack.ir.arrays import Feeds
from edgepack.ir.model import walk_nodes
from edgepack.runtime.session import OrtRunner, open_optimized, open_session

# NCHWc layouts depend on the build host's vector width: a file with them fails to load on aarch64.
HOST_ONLY_OPTIMIZERS = ("NchwcTransformer",)
LEAST_SQNR_DB = 60.0
"""The file has the kernels of the .onnx and is bit-exact, but a model may have random operators."""


def export_ort(model: Path, path: Path, runtime: Runtime, feeds: Sequence[Feeds] = ()) -> Path:
    """Write ``model`` to ``path`` as ``.ort``, and compare its outputs with those of ``model`` on ``feeds``.

    All optimizations are applied here (the "Fixed" optimization style): onnxruntime does not optimize a
    loaded .ort. For targets with kernels for int8 activations ``runtime`` has ``session.qdqisint8allowed``;
    without it a file that is written on x86 has uint8 kernels.

    Also writes ``<name>.required_operators.config``, the input of a reduced build of onnxruntime, and returns
    its path.

    Raises:
        ExportError: the runtime cannot write the file, cannot load it, or gives other outputs with it.
    """
    portable = runtime.model_copy(
        update={"disabled_optimizers": (*runtime.disabled_optimizers, *HOST_ONLY_OPTIMIZERS)}
    )
    writing = portable.model_copy(
        update={"session_config": {**portable.session_config, "session.save_model_format": "ORT"}}
    )
    config = path.with_suffix(".required_operators.config")
    try:
        open_session(model, writing, optimized_path=path)
        config.write_text(required_operators(model, portable), encoding="utf-8")
        _compare(model, path, portable, feeds)
    except ModelError as error:
        raise ExportError(f"{path}: no .ort could be made: {error}") from error
    return config


def _compare(model: Path, path: Path, runtime: Runtime, feeds: Sequence[Feeds]) -> None:
    written = OrtRunner(open_session(path, runtime))
    if not feeds:
        return
    reference = OrtRunner(open_session(model, runtime))
    compared = compare_outputs([reference.run(feed) for feed in feeds], written, feeds)
    if compared.sqnr_db < LEAST_SQNR_DB:
        raise ExportError(
            f"{path}: its outputs have an SQNR of {compared.sqnr_db:.1f} dB against those of {model} on the "
            "same kernels: the runtime wrote another model than it ran"
        )


def required_operators(model: Path, runtime: Runtime) -> str:
    """The operators of the optimized graph by their "since version", for a reduced build.

    Lines ``domain;opset;Op1,Op2``, the format of onnxruntime's ``--include_ops_by_config``.
    """
    with tempfile.TemporaryDirectory(prefix="edgepack-ort-") as folder:
        _session, written = open_optimized(model, runtime, Path(folder))
    used: dict[tuple[str, int], set[str]] = {}
    for node in walk_nodes(written.graph):
        since = _since(node, written.opset_imports.get(node.domain, 1))
        used.setdefault((node.domain or "ai.onnx", since), set()).add(node.op_type)
    lines = [f"{domain};{since};{','.join(sorted(ops))}" for (domain, since), ops in sorted(used.items())]
    return "\n".join(["# operators of the model, for a reduced build of onnxruntime", *lines, ""])


def _since(node: ir.Node, opset: int) -> int:
    """The "since version" of the operator in ``opset``."""
    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=opset, domain=node.domain)
    except onnx.defs.SchemaError:
        # Operators that ONNX does not define, such as the runtime's own, have version 1.
        return 1
    return int(schema.since_version)
