"""The ``.onnx`` artifact: the quantized model, with its origin in the metadata."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import onnx_ir as ir

from edgepack import __version__
from edgepack.graph.compact import compact
from edgepack.ir.files import save_model

PREFIX = "edgepack."


def export_onnx(
    model: ir.Model, path: Path, facts: Mapping[str, object], kept_names: Collection[str]
) -> None:
    """Write ``model`` to ``path``, checked; ``facts`` become metadata entries ``edgepack.<key>``.

    The model's own metadata are kept (a text recognition model has its alphabet there), and the names of the
    values in ``kept_names``, see :func:`edgepack.graph.compact.compact`.

    Raises:
        ExportError: the checker refuses the model, or the file cannot be written.
    """
    described = compact(model, kept_names)
    described.producer_name, described.producer_version = "edgepack", __version__
    described.metadata_props[f"{PREFIX}version"] = __version__
    for key, value in facts.items():
        written = (
            value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))
        )
        described.metadata_props[f"{PREFIX}{key}"] = written
    save_model(described, path)
