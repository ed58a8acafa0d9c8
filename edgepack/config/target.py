"""Targets: what a device can do. A target is a YAML file, never code."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgepack.config.strict_yaml import Strict, parse, read_yaml
from edgepack.errors import ConfigError, did_you_mean
from edgepack.ir.scheme import Granularity, QuantScheme, QuantType

Format = Literal["onnx", "ort", "tflite", "epk"]


class Runtime(Strict):
    """The runtime that will execute the model, and how to open a session like it on the build host."""

    provider: str = "CPUExecutionProvider"
    """onnxruntime execution provider."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Intra-op threads of a session."""
    session_config: dict[str, str] = {}
    """onnxruntime session configuration entries, such as session.qdqisint8allowed."""
    disabled_optimizers: tuple[str, ...] = ()
    """onnxruntime graph optimizers that a session for this target must not run."""

    absent_optimizers: tuple[str, ...] = ()
    """onnxruntime graph optimizers for kernels that the host has and the device has not. Forms are weighed
    against each other without them; in the bench they stay, so that no speed-up is flattered."""

    def as_on_device(self) -> "Runtime":
        """The same without what the device has not."""
        return self.model_copy(
            update={"disabled_optimizers": (*self.disabled_optimizers, *self.absent_optimizers)}
        )

    def sparing(self) -> "Runtime":
        """The same, but weights stay in the file, mapped: not laid out anew for the CPU, which copies all.

        Measured on one core: a matrix product with one row takes about 1.3 times as long.
        """
        return self.model_copy(
            update={"session_config": {**self.session_config, "session.disable_prepacking": "1"}}
        )


class Kernels(Strict):
    """Which ONNX operators the runtime executes on integers. Everything else stays float."""

    integer: tuple[str, ...]
    """Operators with an integer kernel between a DequantizeLinear and a QuantizeLinear."""
    same_scale: tuple[str, ...]
    """Operators that only move data: output and input share one scale, so they run on stored integers."""
    dynamic: tuple[str, ...] = ()
    """Operators whose weights can be int8 while activation ranges are found at run time."""
    weight_only: tuple[str, ...] = ()
    """Operators whose weights can be stored int8 and used in float."""
    folds_constants: bool = False
    """Whether the runtime computes what follows from constants alone when it loads the file: then all large
    constants can be stored int8, whatever reads them."""
    weight_bits: dict[str, tuple[Literal[4, 6, 8], ...]] = {}
    """Sizes of weights by operator; eight bits alone where an operator is not named. Four are an INT4 tensor
    where the weight is used in float; what lies between is stored as int8."""
    float_output: tuple[str, ...] = ("MatMul", "Gemm")
    """Operators with an integer kernel whose output is float, better where nothing integer follows."""
    fuses_activation: tuple[str, ...] = ("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat")
    """Operators whose kernels write integers of any scale: saturation can stand for a Relu or Clip behind."""
    stand_ins: tuple[Literal["AveragePool", "Resize"], ...] = ()
    """Operators whose integer kernel is slow: an average is written as a depthwise convolution, nearest
    resizing as a choice of rows and columns."""
    resize_modes: tuple[Literal["nearest", "linear"], ...] = ("nearest",)
    """How a same_scale Resize may interpolate."""
    activation_products: bool = True
    """Whether a MatMul of two activations has an integer kernel, too."""
    to_the_end: bool = False
    """Elementwise and moving operators stay integer up to the outputs, though nothing integer follows."""


class Tflite(Strict):
    """How a ``.tflite`` is written, and what its runtime can do."""

    io: Literal["float", "int8"] = "float"
    """Whether inputs and outputs are float, or the int8 that is inside."""
    dims: dict[str, Annotated[int, Field(gt=0)]] = {}
    """Sizes of the dimensions that the model leaves open, by name or by place (`x[3]`); the first of an
    input is 1 where nothing else is said."""
    kernels: Kernels


class Quantization(Strict):
    """The integer arithmetic of the target."""

    activation_type: QuantType = QuantType.UINT8
    activation_symmetric: bool = False
    weight_type: QuantType = QuantType.INT8
    weight_granularity: Granularity = Granularity.PER_CHANNEL
    reduce_range: bool = False
    """Drop one bit of all weights."""
    saturates: bool = False
    """The kernels add pairs of u8 × s8 products in saturating 16 bits (x86 without VNNI): outputs whose sums
    would saturate on the calibration data, and only those, get weights of seven bits."""

    input_channels_multiple: Annotated[int, Field(ge=1)] = 1
    """The fast kernels of spatial convolutions read input channels in groups of this many: an input of three
    gets a fourth of zeros. Done where it adds at most half of the channels."""

    depthwise_channels_multiple: Annotated[int, Field(ge=1)] = 1
    """The kernel of depthwise convolutions works on this many channels at a time and on the rest one by one:
    others get channels of zeros, where it adds at most half of them."""

    pruned_channels_multiple: Annotated[int, Field(ge=1)] = 8
    """Structured pruning leaves a multiple of this many channels: kernels work on several at a time, and what
    is left over costs as much as a whole step."""

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
    """Largest allowed loss of the user's metric against the original (0.005 is half a point of accuracy)."""
    min_sqnr_db: float | None = None
    """Least fidelity of the outputs to the original's, in dB."""
    min_centred_sqnr_db: float | None = None
    """The same with the means of the outputs over the samples left out of the signal: of what the outputs
    tell apart. 15 without a metric and without another limit of fidelity."""
    min_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least share of samples whose argmax equals the original's."""
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
    """Which files a build writes."""
    optional: tuple[Format, ...] = ()
    """Formats that a package may lack: where the model has no such form, the report says which node and why,
    and the rest is built. A format that is not optional ends the build instead."""
    min_opset: Annotated[int, Field(ge=13)] = 13
    """The model is raised to at least this opset (13 is the first with per-channel QuantizeLinear)."""
    max_opset: int = 21
    """The newest opset that the runtime loads."""
    runtime: Runtime = Runtime()
    quantization: Quantization = Quantization()
    kernels: Kernels
    tflite: Tflite | None = None
    """Needed where `tflite` is among the formats."""
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
    """Where targets are looked for: ``$EDGEPACK_TARGETS``, ``./targets``, those shipped with edgepack."""
    extra = os.environ.get("EDGEPACK_TARGETS")
    shipped = Path(__file__).parents[1] / "_targets"
    # In a checkout the package has no copy: the folder stands beside it.
    beside = Path(__file__).parents[2] / "targets"
    folders = [*([Path(extra)] if extra else []), Path("targets"), shipped, beside]
    return [folder for folder in folders if folder.is_dir()]


def list_targets() -> dict[str, Path]:
    """All targets by name; where two folders have the same name, the first folder wins."""
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
