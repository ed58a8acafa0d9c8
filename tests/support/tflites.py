"""Small .tflite files made as a build makes them, without its measurements."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from support.onnx_models import Array, conv_net

from edgepack.calibration.run import calibrate
from edgepack.config.recipe import Calibration, Data
from edgepack.config.target import Target, load_target
from edgepack.data.samples import open_samples
from edgepack.export.tflite.export import TfliteSummary, export_tflite, plan_tflite, tensors_for
from edgepack.graph.normalize import normalize
from edgepack.ir.files import save_model
from edgepack.ir.inputs import input_specs
from edgepack.quantization.weights.rounding import Rounder


def mobile(io: Literal["float", "int8"] = "float") -> Target:
    """The shipped target, with inputs and outputs of that type."""
    target = load_target("mobile")
    assert target.tflite is not None
    return target.model_copy(update={"tflite": target.tflite.model_copy(update={"io": io})})


def write_tflite(
    model: ir.Model, folder: Path, samples: Mapping[str, Array], io: Literal["float", "int8"] = "float"
) -> tuple[Path, Path, TfliteSummary]:
    """``model`` as folder/float.onnx and folder/model.tflite, calibrated on stacked ``samples``."""
    save_model(model, folder / "float.onnx")
    np.savez(folder / "samples.npz", allow_pickle=False, **dict(samples))
    normal, _ = normalize(model, min_opset=13, max_opset=21)
    target, inputs = mobile(io), input_specs(model)
    data = open_samples(Data(path=str(folder / "samples.npz")), "calibration", inputs, {}, base=folder)
    table = calibrate(normal, data, tensors_for(normal, target), Calibration(observer="minmax"), threads=1)
    plan = plan_tflite(normal, table.ranges, target, {})
    path = folder / "model.tflite"
    summary = export_tflite(normal, plan, Rounder(normal)(plan), path, io=io, dims={}, facts={"k": "v"})
    return folder / "float.onnx", path, summary


def write_conv_net(folder: Path, io: Literal["float", "int8"] = "float") -> tuple[Path, Path]:
    """``conv_net``: ``x[batch, 3, 8, 8] -> y[batch, 5]``, as .onnx and .tflite."""
    samples = np.random.default_rng(0).normal(size=(8, 1, 3, 8, 8)).astype(np.float32)
    return write_tflite(conv_net(), folder, {"x": samples}, io)[:2]
