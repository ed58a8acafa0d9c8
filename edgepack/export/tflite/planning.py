"""The plan of a ``.tflite``: the same ranges, for the kernels of its runtime."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from edgepack.calibration.ranges import Range
from edgepack.config.target import Target, Tflite
from edgepack.errors import ConfigError
from edgepack.ir.model import name_of
from edgepack.ir.scheme import QuantType
from edgepack.quantization.groups import FusionGroup, find_fusion_groups
from edgepack.quantization.plan.plan import make_plan, tensors_to_observe
from edgepack.quantization.plan.types import Precision, Precisions, QuantPlan, Request
from edgepack.results import Cause, Reason

NORMALIZATION = Reason(Cause.NO_KERNEL, "part of a layer normalization, which computes in float")


def tensors_for(model: ir.Model, target: Target) -> list[str]:
    """Values whose ranges the plans of all formats of ``target`` need, for one calibration."""
    tables = [target.kernels]
    if target.tflite is not None:
        tables.append(target.tflite.kernels)
    return list(dict.fromkeys(n for t in tables for n in tensors_to_observe(find_fusion_groups(model, t))))


def plan_tflite(model: ir.Model, ranges: Mapping[str, Range], target: Target, fixed: Precisions) -> QuantPlan:
    """The plan of the ``.tflite`` of a normalized model: int8 wherever there is a kernel.

    ``fixed`` are the precisions that the user set; one that TFLite does not support becomes float.

    Raises:
        ConfigError: the target has no ``tflite`` section.
        CalibrationError: a range that the plan needs was not measured.
    """
    settings = tflite_of(target)
    kernels = settings.kernels.model_copy(update={"to_the_end": settings.io == "int8"})
    groups = find_fusion_groups(model, kernels)
    quantization = target.quantization.model_copy(
        update={"activation_type": QuantType.INT8, "input_channels_multiple": 1, "reduce_range": False}
    )
    device = target.model_copy(update={"kernels": kernels, "quantization": quantization})
    methods = {u.name: Request(_default(u)) for u in groups}
    methods |= dict.fromkeys(_layer_normalizations(model), Request(Precision.FLOAT, NORMALIZATION))
    methods |= {name: form for name, form in fixed.items() if name in methods}
    return make_plan(model, groups, ranges, device, methods)


def tflite_of(target: Target) -> Tflite:
    """The target's settings for ``.tflite``.

    Raises:
        ConfigError: it has none.
    """
    if target.tflite is None:
        raise ConfigError(f"target {target.name!r} has no `tflite:` section with the runtime's kernels")
    return target.tflite


def _default(group: FusionGroup) -> Precision:
    table = group.op_type == "Gather" and bool(group.constants)
    return Precision.WEIGHT_ONLY if table else Precision.STATIC


def _layer_normalizations(model: ir.Model) -> Sequence[str]:
    """First nodes of layer normalizations, for whose variance eight bits are too few.

    Given: ``m = ReduceMean(x); d = Sub(x, m); v = ReduceMean(d * d) ...``. Result: the name of the first
    ReduceMean; the nodes after it are float since their input is float.
    """
    found = []
    for node in model.graph:
        if node.op_type != "ReduceMean":
            continue
        consumers = [use.node for use in node.outputs[0].uses()]
        if any(r.op_type == "Sub" and r.inputs[0] is node.inputs[0] for r in consumers):
            found.append(name_of_node(node))
    return found


def name_of_node(node: ir.Node) -> str:
    """The name of a node; normalization names all nodes."""
    assert node.name, f"the node that computes {name_of(node.outputs[0])} has no name"
    return node.name
