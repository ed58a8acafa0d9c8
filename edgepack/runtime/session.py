"""onnxruntime sessions with the settings of a target."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepack.config.target import Runtime
from edgepack.errors import ConfigError, ModelError, did_you_mean
from edgepack.ir.arrays import Array, Feeds
from edgepack.ir.inputs import InputSpec

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime as ort

QUIET = 3
CPU = "CPUExecutionProvider"
RUNTIME_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(string)": "str"}
"""Types whose names differ between the runtime and NumPy."""


def open_session(
    model: Path | bytes,
    runtime: Runtime,
    *,
    lean: bool = False,
    optimize: bool = True,
    optimized_path: Path | None = None,
    profile_prefix: Path | None = None,
) -> "ort.InferenceSession":
    """A session of ``model`` with the target's provider, threads and settings.

    ``model`` is a file, or a serialized model below 2 GB. ``lean`` keeps no memory between runs (for
    calibration, where shapes vary); without ``optimize`` the graph is not optimized; the runtime writes the
    optimized graph to ``optimized_path``; ``profile_prefix`` turns profiling on.

    Raises:
        ConfigError: this onnxruntime does not have the provider.
        ModelError: the runtime rejects the model.
    """
    import onnxruntime as ort  # noqa: PLC0415  # a third of a second that --help must not cost

    available = ort.get_available_providers()
    if runtime.provider not in available:
        raise ConfigError(
            f"runtime.provider: this onnxruntime has no {runtime.provider!r}, "
            f"{did_you_mean(runtime.provider, available)}"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = runtime.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = QUIET
    options.enable_cpu_mem_arena = options.enable_mem_pattern = not lean
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in runtime.session_config.items():
        options.add_session_config_entry(key, value)
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    try:
        return ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=[runtime.provider],
            disabled_optimizers=list(runtime.disabled_optimizers) or None,
        )
    except Exception as error:  # onnxruntime's exceptions have no common base class
        name = "the model" if isinstance(model, bytes) else model
        raise ModelError(f"{name}: onnxruntime refuses it: {str(error).splitlines()[0]}") from error


def open_optimized(
    model: Path, runtime: Runtime, folder: Path, *, profile_prefix: Path | None = None
) -> tuple["ort.InferenceSession", "ir.Model"]:
    """A session and its optimized graph, nodes in execution order; the graph is written to ``folder``.

    Raises:
        ConfigError, ModelError: see :func:`open_session`.
    """
    import onnx_ir as ir  # noqa: PLC0415  # half a second that a cold start must not cost

    path = folder / "optimized.onnx"
    # Weights go to an external data file, since a protobuf is limited to 2 GB.
    written = {
        "session.save_model_format": "ONNX",
        "session.optimized_model_external_initializers_file_name": "optimized.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    }
    settings = runtime.model_copy(update={"session_config": {**runtime.session_config, **written}})
    session = open_session(model, settings, optimized_path=path, profile_prefix=profile_prefix)
    return session, ir.load(path)


def run(session: "ort.InferenceSession", feeds: Feeds) -> dict[str, Array]:
    """The outputs of one run, by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class OrtRunner:
    """An open session; see :class:`edgepack.runtime.runner.Runner`."""

    session: "ort.InferenceSession"

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """Names, types and shapes as the session reports them."""
        return tuple(
            InputSpec(
                value.name,
                np.dtype(RUNTIME_TYPES.get(value.type, value.type.removeprefix("tensor(").removesuffix(")"))),
                tuple(value.shape),
            )
            for value in self.session.get_inputs()
        )

    @property
    def one_thread(self) -> bool:
        """Whether inference runs in the calling thread only."""
        threads: int = self.session.get_session_options().intra_op_num_threads
        providers: list[str] = self.session.get_providers()
        return threads == 1 and providers == [CPU]

    def prepare(self, feeds: Feeds) -> Feeds:
        """The feeds unchanged: an ONNX file takes its declared types."""
        return dict(feeds)

    def call(self, prepared: Feeds) -> list[Array]:
        """Run inference."""
        outputs: list[Array] = self.session.run(None, prepared)
        return outputs

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """The outputs of one run, by name."""
        return run(self.session, feeds)
