"""One way to run a model file, whatever runtime reads it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from edgepack.config.target import Runtime
from edgepack.errors import ModelError
from edgepack.ir.arrays import Array, Feeds
from edgepack.ir.inputs import InputSpec
from edgepack.runtime.exact import open_exact
from edgepack.runtime.host import ExactRuntime
from edgepack.runtime.litert import litert, open_tflite
from edgepack.runtime.session import OrtRunner, open_session

Outputs = dict[str, Array]
"""Arrays by the output's name, real values."""


class Runner(Protocol):
    """An open model, fed and read under the names of the ONNX model that the file was made of."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What it must be fed; real values for an input that the file stores as integers."""

    @property
    def one_thread(self) -> bool:
        """Whether all work is done in the thread that calls."""

    def prepare(self, feeds: Feeds) -> Feeds:
        """``feeds`` in the file's own types: what an application does before it calls."""

    def call(self, prepared: Feeds) -> Sequence[Array]:
        """One run, and the file's own outputs: what is timed."""

    def run(self, feeds: Feeds) -> Outputs:
        """One run from real values to real values."""


def open_model(path: Path, runtime: Runtime) -> Runner:
    """``path`` as the target's runtime opens it: ``.tflite`` by LiteRT, all else by onnxruntime.

    Raises:
        ConfigError: what is needed to run it is not here.
        ModelError: the file is not there, or the runtime refuses it.
    """
    if not path.is_file():
        raise ModelError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give a model file")
    if path.suffix == ".tflite":
        return open_tflite(path, runtime.threads)
    return OrtRunner(
        open_exact(path, runtime) if isinstance(runtime, ExactRuntime) else open_session(path, runtime)
    )


def load_library(path: Path) -> None:
    """Import what :func:`open_model` needs for ``path``, so that it is not measured with it.

    Raises:
        ConfigError: it is not here.
    """
    if path.suffix == ".tflite":
        litert()
        import tflite  # noqa: F401, PLC0415  # reads the metadata
    else:
        import onnxruntime  # noqa: F401, PLC0415  # a third of a second that --help must not cost
