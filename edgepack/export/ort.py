"""The ``.ort`` artifact: onnxruntime's own format, for its reduced builds on phones and boards."""

import tempfile
from pathlib import Path

import onnx_ir as ir

from edgepack.errors import ExportError, ModelError
from edgepack.measure.session import open_session
from edgepack.target import Runtime

# NCHWc layouts are laid out for the build host's vectors: a file with them fails to load on aarch64.
HOST_ONLY_OPTIMIZERS = ("NchwcTransformer",)


def export_ort(model: Path, path: Path, runtime: Runtime) -> Path:
    """Write ``model`` to ``path`` as ``.ort`` (fixed style: all optimizations are done here).

    Also writes ``<name>.required_operators.config`` beside, which a reduced build of onnxruntime takes;
    its path is returned.

    Raises:
        ExportError: the runtime cannot write the file, or cannot load what it wrote.
    """
    portable = runtime.model_copy(
        update={
            "session_config": {**runtime.session_config, "session.save_model_format": "ORT"},
            "disabled_optimizers": (*runtime.disabled_optimizers, *HOST_ONLY_OPTIMIZERS),
        }
    )
    try:
        open_session(model, portable, optimized_path=path)
        open_session(path, runtime)
    except ModelError as error:
        raise ExportError(f"{path}: no .ort could be made: {error}") from error
    config = path.with_suffix(".required_operators.config")
    config.write_text(required_operators(model, portable), encoding="utf-8")
    return config


def required_operators(model: Path, runtime: Runtime) -> str:
    """The operators of the optimized graph, a line ``domain;opset;Op1,Op2`` for each domain."""
    as_onnx = runtime.model_copy(
        update={"session_config": {**runtime.session_config, "session.save_model_format": "ONNX"}}
    )
    with tempfile.TemporaryDirectory(prefix="edgepack-ort-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(model, as_onnx, optimized_path=optimized)
        written = ir.load(optimized)
        used: dict[str, set[str]] = {}
        for node in ir.traversal.RecursiveGraphIterator(written.graph):
            used.setdefault(node.domain or "ai.onnx", set()).add(node.op_type)
        opsets = {domain or "ai.onnx": n for domain, n in written.opset_imports.items()}
    lines = [
        f"{domain};{opsets.get(domain, 1)};{','.join(sorted(ops))}" for domain, ops in sorted(used.items())
    ]
    return "\n".join(["# operators of the model, for a reduced build of onnxruntime", *lines, ""])
