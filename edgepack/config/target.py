"""Targets: the capabilities of a device. A target is a YAML file, never code."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgepack.config.strict_yaml import Strict, parse, read_yaml
from edgepack.errors import ConfigError, did_you_mean
from edgepack.ir.scheme import Granularity, QuantScheme, QuantType

Format = Literal["onnx", "ort", "tflite", "epk"]


class Runtime(Strict):
    """The runtime that executes the model, and how to open an equivalent session on the build host."""

    provider: str = "CPUExecutionProvider"
    """onnxruntime execution provider."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Intra-op threads of a session."""
    session_config: dict[str, str] = {}
    """onnxruntime session configuration entries, such as session.qdqisint8allowed."""
    disabled_optimizers: tuple[str, ...] = ()
    """onnxruntime graph optimizers that a session for this target must not run."""

    absent_optimizers: tuple[str, ...] = ()
    """onnxruntime graph optimizers for kernels that the host has and the device lacks. Candidates are
    compared without them; the bench runs with them, so that no speed-up is overstated."""

    def as_on_device(self) -> "Runtime":
        """The same runtime without the optimizers that the device lacks."""
        return self.model_copy(
            update={"disabled_optimizers": (*self.disabled_optimizers, *self.absent_optimizers)}
        )

    def sparing(self) -> "Runtime":
        """The same runtime without weight prepacking: weights stay memory-mapped, and are not copied.

        Measured on one core: a MatMul with one row takes about 1.3 times as long.
        """
        return self.model_copy(
            update={"session_config": {**self.session_config, "session.disable_prepacking": "1"}}
        )


class Kernels(Strict):
    """The ONNX operators that the runtime executes in int8. All others stay in float."""

    integer: tuple[str, ...]
    """Operators with an int8 kernel between a DequantizeLinear and a QuantizeLinear."""
    same_scale: tuple[str, ...]
    """Operators that only move data: output and input share one scale, so they run on int8 values."""
    dynamic: tuple[str, ...] = ()
    """Operators with dynamic quantization: int8 weights, activation ranges computed at run time."""
    weight_only: tuple[str, ...] = ()
    """Operators whose weights can be stored in int8 and dequantized to float (weight-only)."""
    folds_constants: bool = False
    """Whether the runtime folds constants at load time: then all large constants can be stored in int8,
    whatever node consumes them."""
    weight_bits: dict[str, tuple[Literal[4, 6, 8], ...]] = {}
    """Weight bits by operator; 8 if an operator is not named. 4 bits are an INT4 tensor if the weight is
    dequantized to float; other sizes are stored as int8."""
    float_output: tuple[str, ...] = ("MatMul", "Gemm")
    """Operators with an int8 kernel whose output is float; preferred if no int8 node follows."""
    fuses_activation: tuple[str, ...] = ("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat")
    """Operators whose kernels write int8 of any scale: saturation replaces a following Relu or Clip."""
    stand_ins: tuple[Literal["AveragePool", "Resize"], ...] = ()
    """Operators whose int8 kernel is slow: an average pooling becomes a depthwise convolution, a nearest
    Resize becomes a selection of rows and columns."""
    resize_modes: tuple[Literal["nearest", "linear"], ...] = ("nearest",)
    """Interpolation modes that a same_scale Resize may have."""
    activation_products: bool = True
    """Whether a MatMul of two activations has an int8 kernel, too."""
    to_the_end: bool = False
    """Whether elementwise and data-moving operators before outputs run in int8, even if no int8 kernel
    follows."""


class Tflite(Strict):
    """How a ``.tflite`` is written, and what its runtime supports."""

    io: Literal["float", "int8"] = "float"
    """Type of inputs and outputs: float, or int8 as inside."""
    dims: dict[str, Annotated[int, Field(gt=0)]] = {}
    """Sizes of the model's dynamic dimensions, by name or by index (`x[3]`); by default the first dimension
    of an input is 1."""
    kernels: Kernels


class Quantization(Strict):
    """The integer arithmetic of the target."""

    activation_type: QuantType = QuantType.UINT8
    activation_symmetric: bool = False
    weight_type: QuantType = QuantType.INT8
    weight_granularity: Granularity = Granularity.PER_CHANNEL
    reduce_range: bool = False
    """Reduce the range of all weights to 7 bits."""
    saturates: bool = False
    """The kernels add pairs of u8 × s8 products in saturating 16 bits (x86 without VNNI): output channels
    whose sums would saturate on the calibration data, and only those, get 7-bit weights."""

    input_channels_multiple: Annotated[int, Field(ge=1)] = 1
    """The fast kernels of spatial convolutions process input channels in groups of this many: an input of
    three channels is padded to four. Applied where it adds at most half of the channels."""

    depthwise_channels_multiple: Annotated[int, Field(ge=1)] = 1
    """The depthwise kernel processes this many channels at a time and the remainder one by one: convolutions
    are padded with zero channels, where that adds at most half of them."""

    pruned_channels_multiple: Annotated[int, Field(ge=1)] = 8
    """Structured pruning keeps a multiple of this many channels: kernels process several at a time, and a
    remainder costs as much as a full step."""

    @property
    def activation(self) -> QuantScheme:
        """The scheme of activations."""
        return QuantScheme(self.activation_type, self.activation_symmetric)

    @property
    def weight(self) -> QuantScheme:
        """The scheme of weights, always symmetric."""
        return QuantScheme(self.weight_type, True, self.weight_granularity, self.reduce_range, self.saturates)


class Gate(Strict):
    """Limits that a build must keep; a limit that is absent is not checked."""

    max_metric_drop: Annotated[float, Field(ge=0)] | None = None
    """Largest allowed drop of the metric from the original's (0.005 is half a point of accuracy)."""
    min_sqnr_db: float | None = None
    """Least SQNR of the outputs against the original's, in dB."""
    min_centred_sqnr_db: float | None = None
    """Least centred SQNR: the means of the original's outputs over the samples are subtracted from the
    signal, so that only what varies counts. 15 without a metric and without another limit of fidelity."""
    min_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least share of samples with the same argmax as the original."""
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    """Largest allowed file size in bytes."""
    max_latency_ms: Annotated[float, Field(gt=0)] | None = None
    """Largest allowed median latency on the bench, in milliseconds."""
    min_speedup: Annotated[float, Field(gt=0)] | None = None
    """Least ratio of the original's median latency to the built model's, measured interleaved."""


class Target(Strict):
    """One kind of device."""

    name: str
    description: str
    formats: tuple[Format, ...]
    """The files that a build writes."""
    optional: tuple[Format, ...] = ()
    """Formats that a package may lack: if the model cannot be converted, the report names the node and the
    reason, and the other formats are built. If a format that is not optional fails, the build fails."""
    min_opset: Annotated[int, Field(ge=13)] = 13
    """The model is raised to at least this opset (13 is the first with per-channel QuantizeLinear)."""
    max_opset: int = 21
    """The newest opset that the runtime loads."""
    runtime: Runtime = Runtime()
    quantization: Quantization = Quantization()
    kernels: Kernels
    tflite: Tflite | None = None
    """Required if `tflite` is among the formats."""
    gate: Gate = Gate()

    @model_validator(mode="after")
    def _formats_are_possible(self) -> "Target":
        if "onnx" in self.optional or not set(self.optional) <= set(self.formats):
            raise ValueError(
                "optional: names formats among `formats:`, and not onnx, which is always written"
            )
        if "tflite" in self.formats and self.tflite is None:
            raise ValueError("formats: tflite needs a `tflite:` section, which says what its runtime can do")
        return self


def target_folders() -> list[Path]:
    """Folders of targets, in order: ``$EDGEPACK_TARGETS``, ``./targets``, those shipped with edgepack."""
    extra = os.environ.get("EDGEPACK_TARGETS")
    shipped = Path(__file__).parents[1] / "_targets"
    # In a checkout the package has no copy: the folder is next to it.
    beside = Path(__file__).parents[2] / "targets"
    folders = [*([Path(extra)] if extra else []), Path("targets"), shipped, beside]
    return [folder for folder in folders if folder.is_dir()]


def list_targets() -> dict[str, Path]:
    """All targets by name; if two folders have the same name, the first folder wins."""
    found: dict[str, Path] = {}
    for folder in target_folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def load_target(name: str) -> Target:
    """The target of that name, or of that ``.yaml`` file.

    Raises:
        ConfigError: unknown name, or the file is not a valid target.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        known = list_targets()
        if name not in known:
            raise ConfigError(
                f"unknown target {name!r}: {did_you_mean(name, known)} "
                "(list them with `edgepack targets`; a path to a .yaml file works too)"
            )
        path = known[name]
    return parse(Target, read_yaml(path), str(path))
