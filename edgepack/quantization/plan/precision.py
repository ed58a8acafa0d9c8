"""The precision of each group as it is asked for, where the target has it and its inputs allow it."""

from collections.abc import Mapping, Sequence

from edgepack.calibration.ranges import Range
from edgepack.config.target import Target
from edgepack.quantization.groups import (
    RECURRENT_OPS,
    FusionGroup,
    Role,
    no_kernel,
)
from edgepack.quantization.plan.types import (
    DYNAMIC_OPS,
    INTEGER_PRECISIONS,
    Precision,
    Precisions,
    Request,
)
from edgepack.results import Cause, Reason

ASKED_FOR = Reason(Cause.REQUEST, "asked for")
EMBEDDING = Reason(Cause.STORAGE, "embedding: int8 rows, dequantized after the look-up")
EMBEDDING_UNFOLDED = Reason(Cause.STORAGE, "embedding: int8 rows, unfolded when the file is loaded")


def first_sweep(
    groups: Sequence[FusionGroup],
    ranges: Mapping[str, Range],
    target: Target,
    methods: Precisions,
) -> dict[str, Request]:
    """Each group's method, sources first; ``integer`` are the values that an integer group leaves."""
    integer: set[str] = set()
    forms: dict[str, Request] = {}
    for group in groups:
        forms[group.name] = _form(group, integer, ranges, target, methods[group.name])
        if forms[group.name].precision is Precision.STATIC:
            integer.update(group.outputs)
    return forms


def _form(
    group: FusionGroup,
    integer: set[str],
    ranges: Mapping[str, Range],
    target: Target,
    requested: Request,
) -> Request:
    kernels = target.kernels
    method, why = requested
    if method is Precision.SHARED_SCALE:
        method = Precision.STATIC
    if group.role is Role.FLOAT:
        return Request(in_float(group, method), group.reason)
    if group.constants and not group.inputs and group.op_type == "Gather":
        # An embedding: the table is data, the indices come in.
        if method is Precision.FLOAT:
            return Request(Precision.FLOAT, why or ASKED_FOR)
        if method is Precision.STORED and kernels.folds_constants:
            return Request(Precision.STORED, EMBEDDING_UNFOLDED)
        if "Gather" in kernels.weight_only:
            return Request(Precision.WEIGHT_ONLY, EMBEDDING)
        return Request(Precision.FLOAT, no_kernel("weight_only", "Gather"))
    if not group.inputs:
        return Request(Precision.FLOAT, Reason(Cause.OPERATOR, "reads constants only"))
    if method is Precision.FLOAT:
        return Request(Precision.FLOAT, why or ASKED_FOR)
    if group.role is Role.HEAVY:
        return _heavy_form(group, ranges, target, method, why)
    if method is not Precision.STATIC:
        return Request(in_float(group, method), why or Reason(Cause.OPERATOR, f"has no {method} form"))
    missing = [name for name in group.inputs if name not in integer]
    if missing:
        reason = Reason(Cause.NEIGHBOURS, f"its input {missing[0]!r} is float", "an input is float")
        return Request(in_float(group, method), reason)
    unmeasured = [name for name in group.outputs if name not in ranges and group.role is Role.LIGHT]
    if unmeasured:
        return Request(in_float(group, method), _unmeasured("its output ", unmeasured[0]))
    return Request(Precision.STATIC)


def _unmeasured(what: str, value: str) -> Reason:
    return Reason(Cause.UNMEASURED, f"no sample reached {what}{value!r}")


def in_float(group: FusionGroup, asked: Precision) -> Precision:
    """The form of a group that computes in float; float itself if asked for, or where nothing is to store."""
    return Precision.STORED if group.stored and asked is not Precision.FLOAT else Precision.FLOAT


def _heavy_form(
    group: FusionGroup, ranges: Mapping[str, Range], target: Target, method: Precision, why: Reason
) -> Request:
    """``why``, the reason of the request, explains the form asked for, and float instead of stored weights.

    Where an integer form was asked for and another one results, the reason is that of the plan.
    """
    kernels, op = target.kernels, group.op_type
    asked_integer = method in INTEGER_PRECISIONS
    if method is Precision.STATIC and op in kernels.integer and op not in RECURRENT_OPS:
        unmeasured = [name for name in (*group.inputs, *group.outputs) if name not in ranges]
        if unmeasured:
            return Request(Precision.FLOAT, _unmeasured("", unmeasured[0]))
        return Request(Precision.STATIC, why)
    no_form = no_kernel(method, op)
    if group.weight is None:
        no_form = Reason(Cause.NO_KERNEL, f"two activations: no {method} form")
    elif asked_integer and op in kernels.dynamic and op in DYNAMIC_OPS:
        no_static = Reason(Cause.NO_KERNEL, f"no static kernel for {op}", "no static kernel")
        return Request(Precision.DYNAMIC, why if method is Precision.DYNAMIC else no_static)
    elif method is Precision.STORED and op == "MatMul" and kernels.folds_constants:
        return Request(Precision.STORED, why)  # of others the weights are unfolded anyway
    elif op in kernels.weight_only:
        stored = Reason(Cause.NO_KERNEL, f"no {method} kernel for {op}; weights stored as int8")
        return Request(Precision.WEIGHT_ONLY, stored if asked_integer else why)
    return Request(Precision.FLOAT, no_form if asked_integer else why or no_form)
