"""One interface to run a model file in any runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from edgepack.config.target import Runtime
from edgepack.errors import ModelError
from edgepack.ir.arrays import Array, Feeds
from edgepack.ir.inputs import InputSpec
from edgepack.runtime.exact_session import open_exact
from edgepack.runtime.host import ExactRuntime
from edgepack.runtime.litert import litert, open_tflite
from edgepack.runtime.session import OrtRunner, open_session

Outputs = dict[str, Array]
"""Real values by name of the output."""


class Runner(Protocol):
    """An open model; inputs and outputs have the names of the original ONNX model."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """Names, types and shapes of inputs; float for an input that the file takes quantized."""

    @property
    def one_thread(self) -> bool:
        """Whether inference runs in the calling thread only."""

    def prepare(self, feeds: Feeds) -> Feeds:
        """Convert ``feeds`` to the types of the file, as an application does before inference."""

    def call(self, prepared: Feeds) -> Sequence[Array]:
        """Run inference and return the outputs in the types of the file; this is what is timed."""

    def run(self, feeds: Feeds) -> Outputs:
        """Run inference with real values for inputs and outputs."""


def open_model(path: Path, runtime: Runtime) -> Runner:
    """``path`` as the target's runtime opens it: ``.tflite`` by LiteRT, all else by onnxruntime.

    Raises:
        ConfigError: the library that runs it is not installed.
        ModelError: the file does not exist, or the runtime rejects it.
    """
    if not path.is_file():
        raise ModelError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give a model file")
    if path.suffix == ".tflite":
        return open_tflite(path, runtime.threads)
    return OrtRunner(
        open_exact(path, runtime) if isinstance(runtime, ExactRuntime) else open_session(path, runtime)
    )


def load_library(path: Path) -> None:
    """Import the library that :func:`open_model` needs for ``path``, so that the import is not timed.

    Raises:
        ConfigError: it is not installed.
    """
    if path.suffix == ".tflite":
        litert()
        import tflite  # noqa: F401, PLC0415  # reads the metadata
    else:
        import onnxruntime  # noqa: F401, PLC0415  # a third of a second that --help must not cost
