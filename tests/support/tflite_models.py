"""From a model in ONNX text to a ``.tflite``, run beside the same plan in onnxruntime, for tests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from support.onnx_models import Array, parse
from support.quantizing import draw

from edgepack.calibration.ranges import Range
from edgepack.calibration.run import calibrate
from edgepack.config.recipe import Calibration, Data
from edgepack.config.target import Runtime, Target, load_target
from edgepack.data.samples import open_samples
from edgepack.export.tflite.convert import Io
from edgepack.export.tflite.export import TfliteSummary, export_tflite, plan_tflite, tensors_for
from edgepack.graph.normalize import normalize
from edgepack.ir.files import save_model
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.inputs import input_specs
from edgepack.quantization.plan.types import Precision, QuantPlan, Request
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.rounding import Rounder
from edgepack.results import Cause, Reason
from edgepack.runtime.session import open_session
from edgepack.runtime.session import run as run_session

INT8_ALLOWED = Runtime(session_config={"session.qdqisint8allowed": "1"})


@dataclass(frozen=True, slots=True)
class Written:
    """A ``.tflite`` with what it was made from."""

    model: ir.Model
    plan: QuantPlan
    path: Path
    summary: TfliteSummary
    samples: list[dict[str, Array]]
    reference: list[dict[str, Array]]
    """Outputs of the plan, applied to the ONNX model, by onnxruntime on int8 activations."""
    original: list[dict[str, Array]]
    """Outputs of the float model."""

    def steps(self, *, delegate: bool = True, reference: list[dict[str, Array]] | None = None) -> float:
        """The largest difference to the reference, in steps of the output's int8 values."""
        worst = 0.0
        got = [run_tflite(self, sample, delegate=delegate) for sample in self.samples]
        for a, b in zip(got, reference or self.reference, strict=True):
            for name, expected in b.items():
                assert a[name].shape == expected.shape, (name, a[name].shape, expected.shape)
                params = self.plan.activations.get(name)
                step = float(params.scale) if params is not None else 1.0
                delta = np.abs(a[name].astype(np.float64) - expected.astype(np.float64))
                worst = max(worst, float(delta.max()) / step)
        return worst


def device(io: Io = "int8", **kernels: tuple[str, ...]) -> Target:
    """The shipped target for phones, with other kernels."""
    base = load_target("mobile")
    assert base.tflite is not None
    table = base.tflite.kernels.model_copy(update=kernels)
    return base.model_copy(update={"tflite": base.tflite.model_copy(update={"io": io, "kernels": table})})


def write(
    folder: Path,
    body: str,
    weights: Mapping[str, Array] | None = None,
    *,
    io: Io = "int8",
    target: Target | None = None,
    opset: int = 17,
    feeds: Mapping[str, Array] | None = None,
    dims: Mapping[str, int] | None = None,
    fixed: Mapping[str, Precision] | None = None,
    normalized: bool = True,
) -> Written:
    """Plan, round and write a model; ``fixed`` sets methods by the first output of a group."""
    target = target or device(io)
    model = parse(body, opset=opset, weights=weights)
    # Normalization infers shapes and rewrites nodes; some tests need no rewrites.
    model = normalize(model, min_opset=13, max_opset=21)[0] if normalized else named(model)
    stacked = draw(model, feeds or {})
    ranges = measured(model, target, stacked, folder)
    made = {node.outputs[0].name: node.name for node in model.graph}
    methods = {
        str(made[name]): Request(method, Reason(Cause.REQUEST, "asked for"))
        for name, method in (fixed or {}).items()
    }
    plan = plan_tflite(model, ranges, target, methods)
    weights_ = Rounder(model)(plan)
    before = fingerprint(model)
    path = folder / "model.tflite"
    summary = export_tflite(model, plan, weights_, path, io=io, dims=dims or {}, facts={"note": "test"})
    assert fingerprint(model) == before, "the float model was changed"
    source, quantized = folder / "float.onnx", folder / "int8.onnx"
    save_model(model, source)
    save_model(apply_plan(model, plan, weights_), quantized)
    samples = [
        {n: np.asarray(a[i]) for n, a in stacked.items()} for i in range(len(next(iter(stacked.values()))))
    ]
    float_session, session = open_session(source, Runtime()), open_session(quantized, INT8_ALLOWED)
    reference = [dict(run_session(session, sample)) for sample in samples]
    original = [dict(run_session(float_session, sample)) for sample in samples]
    return Written(model, plan, path, summary, samples, reference, original)


def named(model: ir.Model) -> ir.Model:
    """The model with names of nodes and inferred shapes, without rewrites."""
    ir.passes.common.NameFixPass()(model)
    ir.passes.common.ShapeInferencePass()(model)
    for index, node in enumerate(model.graph):
        node.name = node.name or f"node_{index}"
    return model


def measured(model: ir.Model, target: Target, stacked: Mapping[str, Array], folder: Path) -> dict[str, Range]:
    """Min-max ranges of all tensors that the plan may need."""
    path = folder / "calibration.npz"
    np.savez(path, **stacked)  # type: ignore[arg-type]
    samples = open_samples(Data(path=str(path)), "calibration", input_specs(model), {}, base=folder)
    names = tensors_for(model, target)
    return dict(calibrate(model, samples, names, Calibration(observer="minmax"), threads=1).ranges)


def interpreter(path: Path, *, delegate: bool = True) -> Any:
    """An interpreter with or without XNNPACK."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kind = OpResolverType.AUTO if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    opened = Interpreter(str(path), num_threads=1, experimental_op_resolver_type=kind)
    opened.allocate_tensors()
    return opened


def run_tflite(made: Written, sample: Mapping[str, Array], *, delegate: bool = True) -> dict[str, Array]:
    """Outputs in the axes of the ONNX model, dequantized."""
    opened = interpreter(made.path, delegate=delegate)
    for detail in opened.get_input_details():
        order = made.summary.inputs[detail["name"]]
        array = np.ascontiguousarray(sample[detail["name"]].transpose(order))
        if detail["dtype"] == np.int8:
            scale, zero_point = detail["quantization"]
            array = np.clip(np.rint(array / np.float32(scale)) + zero_point, -128, 127).astype(np.int8)
        opened.set_tensor(detail["index"], array)
    opened.invoke()
    outputs = {}
    for detail in opened.get_output_details():
        array = opened.get_tensor(detail["index"])
        if detail["dtype"] == np.int8:
            scale, zero_point = detail["quantization"]
            array = (array.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale)
        outputs[detail["name"]] = array.transpose(np.argsort(made.summary.outputs[detail["name"]]))
    return outputs


def left_out(path: Path) -> list[str]:
    """Names of operators that are not delegated."""
    rows = interpreter(path)._get_ops_details()
    makers = {int(out): row for row in rows if row["op_name"] != "DELEGATE" for out in row["outputs"]}
    taken: set[int] = set()
    for delegate in (row for row in rows if row["op_name"] == "DELEGATE"):
        stop = {int(i) for i in delegate["inputs"]}
        open_ends = [int(i) for i in delegate["outputs"]]
        while open_ends:
            row = makers.get(open_ends.pop())
            if row is not None and row["index"] not in taken:
                taken.add(row["index"])
                open_ends += [int(i) for i in row["inputs"] if int(i) not in stop]
    return [row["op_name"] for row in rows if row["op_name"] != "DELEGATE" and row["index"] not in taken]


def partitions(path: Path) -> int:
    """The number of delegated partitions."""
    return sum(row["op_name"] == "DELEGATE" for row in interpreter(path)._get_ops_details())
