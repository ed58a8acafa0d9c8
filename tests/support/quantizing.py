"""From a model in ONNX text to its integer form, for tests: ranges of real samples, plan, apply, fusion."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from support.onnx_models import Array, parse

from edgepack.calibration.ranges import Range
from edgepack.calibration.run import calibrate
from edgepack.config.recipe import Calibration, Data
from edgepack.config.target import Kernels, Quantization, Runtime, Target, load_target
from edgepack.data.samples import open_samples
from edgepack.graph.normalize import normalize
from edgepack.ir.files import save_model
from edgepack.ir.fingerprint import fingerprint
from edgepack.ir.inputs import input_specs
from edgepack.ir.numerics import sqnr_db
from edgepack.ir.scheme import Granularity, QuantType
from edgepack.quantization.groups import find_fusion_groups
from edgepack.quantization.plan.plan import make_plan, tensors_to_observe
from edgepack.quantization.plan.types import Method, QuantPlan, Request
from edgepack.quantization.rewrite.apply import apply_plan
from edgepack.quantization.weights.rounding import Rounder
from edgepack.runtime.fused import FusionReport, what_the_runtime_did
from edgepack.runtime.host import for_accuracy
from edgepack.runtime.runner import open_model

SAMPLES = 6
U8, S8 = QuantType.UINT8, QuantType.INT8
CHANNEL, TENSOR = Granularity.PER_CHANNEL, Granularity.PER_TENSOR
STATIC, DYNAMIC, WEIGHT_ONLY, FLOAT = Method.STATIC, Method.DYNAMIC, Method.WEIGHT_ONLY, Method.FLOAT


def target(
    activation: QuantType = U8,
    granularity: Granularity = Granularity.PER_CHANNEL,
    *,
    symmetric: bool = False,
    **kernels: tuple[str, ...],
) -> Target:
    """The x86 target with other arithmetic, and all integer kernels of the runtime, the slow ones too.

    int8 activations run as they are, as on ARM.
    """
    base = _shipped()
    all_kernels = {"integer": (*base.kernels.integer, "Softmax"), "stand_ins": ()}
    settings = {"session.qdqisint8allowed": "1"} if activation is S8 else {}
    return base.model_copy(
        update={
            "runtime": Runtime(session_config=settings),
            "quantization": Quantization(
                activation_type=activation, activation_symmetric=symmetric, weight_granularity=granularity
            ),
            "kernels": Kernels(**{**base.kernels.model_dump(), **all_kernels, **kernels}),
        }
    )


@functools.cache
def _shipped() -> Target:
    return load_target("x86-cpu")


def draw(model: ir.Model, feeds: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
    """Stacked samples of every input: those given, else normal floats."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, Array] = {}
    for spec in input_specs(model):
        shape = [d if isinstance(d, int) else 2 for d in spec.shape or ()]
        given = feeds.get(spec.name)
        if given is not None:
            drawn[spec.name] = np.stack([given] * SAMPLES)
        else:
            drawn[spec.name] = rng.normal(size=(SAMPLES, *shape)).astype(spec.dtype)
    return drawn


def ranges_of(
    model: ir.Model, device: Target, stacked: Mapping[str, Array], folder: Path
) -> dict[str, Range]:
    """Min-max ranges of all that a plan may need."""
    path = folder / "calibration.npz"
    np.savez(path, **stacked)  # type: ignore[arg-type]
    samples = open_samples(Data(path=str(path)), "calibration", input_specs(model), {}, base=folder)
    names = tensors_to_observe(find_fusion_groups(model, device.kernels))
    return dict(calibrate(model, samples, names, Calibration(observer="minmax"), threads=1).ranges)


@dataclass(frozen=True, slots=True)
class Built:
    """A float model, its plan and integer form, and what became of it."""

    model: ir.Model
    plan: QuantPlan
    quantized: ir.Model
    path: Path
    fused: FusionReport
    sqnr_db: float

    def forms(self) -> dict[str, str]:
        """Method by the group's first output."""
        return {u.group.outputs[0]: str(u.method) for u in self.plan.groups if u.group.outputs}


def build(
    folder: Path,
    body: str,
    weights: Mapping[str, Array] | None = None,
    *,
    method: Method | Mapping[str, Method] = Method.STATIC,
    device: Target | None = None,
    opset: int = 17,
    feeds: Mapping[str, Array] | None = None,
) -> Built:
    """Quantize a model: ``method`` for all groups, or by the name of a group's first output (else static)."""
    device = device or target()
    model, _ = normalize(parse(body, opset=opset, weights=weights), min_opset=13, max_opset=23)
    stacked = draw(model, feeds or {})
    before = fingerprint(model)
    groups = find_fusion_groups(model, device.kernels)
    ranges = ranges_of(model, device, stacked, folder)
    asked = {
        u.name: Request(
            method if isinstance(method, Method) else method.get((*u.outputs, "")[0], Method.STATIC)
        )
        for u in groups
    }
    plan = make_plan(model, groups, ranges, device, asked)
    quantized = apply_plan(model, plan, Rounder(model)(plan))
    assert fingerprint(model) == before, "the float model was changed"
    path, source = folder / "int8.onnx", folder / "float.onnx"
    save_model(quantized, path)
    save_model(model, source)
    for mine, original in (
        (quantized.graph.inputs, model.graph.inputs),
        (quantized.graph.outputs, model.graph.outputs),
    ):
        assert [(v.name, v.type, v.shape) for v in mine] == [(v.name, v.type, v.shape) for v in original]
    got, expected = [], []
    reference, integers = open_model(source, Runtime()), open_model(path, for_accuracy(device))
    for index in range(SAMPLES):
        sample = {name: np.asarray(array[index]) for name, array in stacked.items()}
        expected += list(reference.run(sample).values())
        got += list(integers.run(sample).values())
    return Built(
        model, plan, quantized, path, what_the_runtime_did(path, device.runtime), sqnr_db(expected, got)
    )


def weight(*shape: int, seed: int = 1, scale: float = 0.5) -> Array:
    """A random weight."""
    return np.asarray(np.random.default_rng(seed).normal(size=shape) * scale, np.float32)
