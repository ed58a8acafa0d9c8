"""Sessions whose integer kernels do not saturate on any host."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgepack.config.target import Runtime
from edgepack.runtime.session import open_optimized, open_session

if TYPE_CHECKING:
    import onnxruntime as ort

INT8_ALLOWED = "session.qdqisint8allowed"


def open_exact(path: Path, runtime: Runtime) -> "ort.InferenceSession":
    """A session of a copy of the ``.onnx`` or ``.ort`` file ``path`` whose weights are uint8.

    onnxruntime's own setting for it (``session.x64quantprecision``) fails to load a model in which two
    operators share a weight or a zero point, and has no effect on an ``.ort``, which is not optimized when it
    is loaded.

    Raises:
        ConfigError, ModelError: see :func:`edgepack.runtime.session.open_session`.
    """
    from edgepack.ir.files import load_model, save_model  # noqa: PLC0415  # half a second, as in session.py
    from edgepack.runtime.unsigned_weights import make_weights_unsigned  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="edgepack-exact-", ignore_cleanup_errors=True) as folder:
        optimized = path.suffix == ".ort"
        model = open_optimized(path, runtime, Path(folder))[1] if optimized else load_model(path)
        # In an .ort the runtime has converted to uint8 what it does not keep as int8.
        int8_activations = optimized or runtime.session_config.get(INT8_ALLOWED) == "1"
        if not make_weights_unsigned(model, int8_activations=int8_activations):
            return open_session(path, runtime)
        copy = Path(folder) / f"{path.stem}.onnx"
        save_model(model, copy, check=False)
        return open_session(copy, runtime, optimize=not optimized)
