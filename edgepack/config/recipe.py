"""The recipe: what the user wants built, from ``edgepack.yaml`` and the command line."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from edgepack.config.passes import Pass, check_order
from edgepack.config.strict_yaml import Strict, parse, read_yaml
from edgepack.config.target import Gate
from edgepack.config.training import AwareTune
from edgepack.errors import ConfigError

Observer = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]
"""The observers. Each is the function of that name in :mod:`edgepack.calibration.observers`."""
Method = Literal["auto", "static", "dynamic", "weight_only", "float"]
Bits = Literal[4, 6, 8]
Preset = Literal["fast", "balanced", "best"]
DATA_KEYS = ("calibration_data", "evaluation_data", "training_data")


class ImageInput(Strict):
    """Preprocessing of an image file to one input tensor ``[1, C, H, W]`` or ``[1, H, W, C]``.

    ``value = (pixel - mean) / std`` with pixels from 0 to 255; ``mean`` and ``std`` are one number or one per
    channel in the order of ``color``.
    """

    height: Annotated[int, Field(gt=0)] | None = None
    """Pixels; if only one of height and width is given, the other keeps the aspect ratio, rounded up."""
    width: Annotated[int, Field(gt=0)] | None = None
    min_width: Annotated[int, Field(gt=0)] = 1
    """Least width, where the width follows from the aspect ratio."""
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    """stretch: resize to height and width. crop: resize the shorter side to resize_short, cut out the centre.
    pad: resize to fit into height and width, then pad with zeros at the right and bottom."""
    resize_short: Annotated[int, Field(gt=0)] | None = None
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    color: Literal["rgb", "bgr", "gray"] = "rgb"
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    layout: Literal["nchw", "nhwc"] = "nchw"


class Labels(Strict):
    """Where the labels of evaluation samples come from; exactly one of the three."""

    array: str | None = None
    """Name of an array in the .npz."""
    filename: str | None = None
    """A regular expression with one group, applied to the file name: `(\\d+)` in `0042.jpg` gives 42."""
    file: Path | None = None
    """A .tsv: file name or stem, then one or more columns; several rows of one file are kept together."""

    @model_validator(mode="after")
    def _one(self) -> "Labels":
        if sum(x is not None for x in (self.array, self.filename, self.file)) != 1:
            raise ValueError("give exactly one of array, filename, file")
        return self


class Data(Strict):
    """One set of samples."""

    path: str
    """A folder of images, .npz or .npy files; one .npz or .npy; or `module:function`, which yields feeds."""
    samples: Annotated[int, Field(gt=0)] | None = None
    """Use at most this many samples (evenly spread); all by default."""
    labels: Labels | None = None


class Calibration(Strict):
    """How activation ranges are measured."""

    observer: Observer = "mse"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """For the percentile observer."""
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """For the moving average observer: weight of the past."""
    bins: Annotated[int, Field(ge=128, le=16384)] = 2048
    """Bins of the streaming histograms."""


class Override(Strict):
    """An exception to the quantization of nodes, by name or by operator type; a name wins over a type."""

    nodes: tuple[str, ...] = ()
    """Node names; `*` and `?` work as in a shell."""
    op_types: tuple[str, ...] = ()
    method: Method = "auto"
    bits: Bits | None = None
    """Weight bits; overrides `weight_bits`."""
    reason: str = "the recipe says so"

    @model_validator(mode="after")
    def _says_something(self) -> "Override":
        if "method" not in self.model_fields_set and self.bits is None:
            raise ValueError("give a method, bits, or both")
        return self


class Quantize(Strict):
    """How the model is quantized."""

    method: Method = "auto"
    """auto measures the candidates that the target supports and takes the fastest that keeps the accuracy."""
    optimize_for: Literal["balance", "speed", "size"] = "balance"
    """balance and speed: groups that are measured slower in int8 stay in float, and no model slower than the
    original is shipped; balance also weighs size. size: the smallest file that is accurate enough."""
    weight_bits: Bits = 8
    """Bits of the weights of Conv, Gemm and MatMul, where the target supports them. 4: the target's 4-bit
    type where weights are dequantized to float, int8 within the 4-bit range elsewhere; 6: int8 within the
    6-bit range, which makes packages smaller, not models."""
    overrides: tuple[Override, ...] = ()
    tune: AwareTune | None = None
    """Quantization-aware training, starting from the rounded weights; needs the extra `tune`."""


class Search(Strict):
    """How preset best searches for the precision of single groups."""

    budget_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that the search may take, after the candidates of the whole model."""


class Tflite(Strict):
    """How a ``.tflite`` is written, if it is among the target's formats; overrides the target."""

    io: Literal["float", "int8"] | None = None
    """Type of inputs and outputs: float, or int8 as inside. By default the target's."""
    dims: dict[str, Annotated[int, Field(gt=0)]] = {}
    """Sizes of the model's dynamic dimensions, by name or by index (`x[3]`); samples must have them. By
    default those of the samples, if all are the same."""


class Bench(Strict):
    """How latency is measured: original and built models are run alternately."""

    warmup: Annotated[int, Field(ge=0)] = 5
    runs: Annotated[int, Field(ge=3)] = 50


class Recipe(Strict):
    """Everything a build needs to know, with all paths resolved."""

    model: Path
    target: tuple[str, ...] = ()
    output: str = "dist/{target}"
    """Folder of the artifacts; `{target}` is replaced by the target's name."""
    calibration_data: Data | None = None
    evaluation_data: Data | None = None
    training_data: Data | None = None
    """Training data of `tune`; by default the calibration data."""
    images: dict[str, ImageInput] = {}
    """Preprocessing by model input name, for image folders."""
    metric: str | None = None
    """top1, accuracy, auc, or `module:function(outputs, labels) -> float`; higher is better."""
    calibration: Calibration = Calibration()
    preset: Preset = "balanced"
    """fast: rounding to nearest with bias correction. balanced: GPTQ, then bias correction. best: balanced,
    then a search for the precision of each group."""
    quantize: Quantize = Quantize()
    search: Search = Search()
    passes: tuple[Pass, ...] = ()
    """Changes to the weights before quantization, applied in this order; none by default."""
    tflite: Tflite = Tflite()
    bench: Bench = Bench()
    gate: Gate | None = None
    """Replaces the target's gate."""
    keep_names: bool = False
    """Constants of the built `.onnx` keep the model's names for them, also when quantized; by default they
    get short names, which take fewer bytes. Activations, nodes, inputs and outputs always keep theirs."""
    seed: int = 0

    @property
    def trains(self) -> bool:
        """Whether anything is trained, which needs torch."""
        return self.quantize.tune is not None or any(entry.tune is not None for entry in self.passes)

    @field_validator("passes")
    @classmethod
    def _in_an_order_that_makes_sense(cls, passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        check_order(passes)
        return passes

    @model_validator(mode="before")
    @classmethod
    def _one_target_may_be_a_word(cls, content: Any) -> Any:
        if isinstance(content, dict) and isinstance(content.get("target"), str):
            return {**content, "target": [content["target"]]}
        return content

    def settings_json(self) -> str:
        """The settings without file paths: the same wherever the project is stored."""
        content = self.model_dump(mode="json", exclude={"model", "output"})
        for data in filter(None, map(content.get, DATA_KEYS)):
            del data["path"]
            if data["labels"]:
                del data["labels"]["file"]
        return json.dumps(content)


def load_recipe(path: Path | None, changes: dict[str, Any]) -> Recipe:
    """The recipe in ``path``, overridden by ``changes`` (from the command line).

    Paths in the file are relative to the file. Without a file, ``changes`` must be complete.

    Raises:
        ConfigError: unknown keys, wrong values, or no model.
    """
    content: dict[str, Any] = {}
    if path is not None:
        content = _relative_to(path.parent, _with_data_mappings(read_yaml(path)))
    content = _merge(content, changes)
    if "model" not in content:
        raise ConfigError(
            "no model: name one (`edgepack build model.onnx`), or run in a folder whose edgepack.yaml has "
            "`model:`"
        )
    return parse(Recipe, content, str(path) if path else "command line")


def _with_data_mappings(content: dict[str, Any]) -> dict[str, Any]:
    """Expand sample data given by a path alone: ``calibration_data: folder/``."""
    paths = {k: v for k, v in content.items() if k in DATA_KEYS and isinstance(v, str)}
    return {**content, **{key: {"path": path} for key, path in paths.items()}}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, new in over.items():
        old = merged.get(key)
        value = _merge(old if isinstance(old, dict) else {}, new) if isinstance(new, dict) else new
        if value not in (None, {}):
            merged[key] = value
    return merged


def _relative_to(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Resolve the paths in a recipe file against the file's folder instead of the working directory."""

    def located(text: Any) -> Any:
        return str(folder / text) if isinstance(text, str) and ":" not in text else text

    moved = dict(content)
    for key in ("model", "output"):
        if key in moved:
            moved[key] = located(moved[key])
    for key in DATA_KEYS:
        part = moved.get(key)
        if isinstance(part, dict):
            part = dict(part)
            if "path" in part:
                part["path"] = located(part["path"])
            labels = part.get("labels")
            if isinstance(labels, dict) and "file" in labels:
                part["labels"] = {**labels, "file": located(labels["file"])}
            moved[key] = part
    return moved
