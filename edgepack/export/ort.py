"""The ``.ort`` artifact: onnxruntime's own format, for its reduced builds on phones and boards."""

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

# NCHWc layouts are laid out for the build host's vectors: a file with them fails to load on aarch64.
HOST_ONLY_OPTIMIZERS = ("NchwcTransformer",)
LEAST_SQNR_DB = 60.0
"""The kernels in the file are those of the .onnx, and so are the bits; an operator may be random."""


def export_ort(model: Path, path: Path, runtime: Runtime, feeds: Sequence[Feeds] = ()) -> Path:
    """Write ``model`` to ``path`` as ``.ort``, and check that it gives what ``model`` gives on ``feeds``.

    All optimizations are done here (the fixed style): onnxruntime runs none of its optimizers on an .ort that
    it loads. For targets whose kernels take s8 activations ``session.qdqisint8allowed`` is in ``runtime``;
    without it a file written on x86 has u8 kernels.

    Also writes ``<name>.required_operators.config`` beside, which a reduced build of onnxruntime takes;
    its path is returned.

    Raises:
        ExportError: the runtime cannot write the file, cannot load what it wrote, or computes something else
            with it.
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
            f"{path}: its outputs are {compared.sqnr_db:.1f} dB from those of {model} on the same kernels: "
            "the runtime wrote another model than it ran"
        )


def required_operators(model: Path, runtime: Runtime) -> str:
    """The operators of the optimized graph by the opset that brought their form, for a reduced build.

    A line ``domain;opset;Op1,Op2`` each, as onnxruntime's ``--include_ops_by_config`` reads them.
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
    """The opset in which the form of the operator appeared that ``opset`` has."""
    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=opset, domain=node.domain)
    except onnx.defs.SchemaError:
        # The runtime's own operators are at version 1, and so are those that it uses before ONNX had them.
        return 1
    return int(schema.since_version)
