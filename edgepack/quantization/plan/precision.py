"""The precision of each group: the requested one where the target and the inputs of the group allow it."""

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
EMBEDDING_UNFOLDED = Reason(Cause.STORAGE, "embedding: int8 rows, dequantized when the file is loaded")


def first_sweep(
    groups: Sequence[FusionGroup],
    ranges: Mapping[str, Range],
    target: Target,
    requests: Precisions,
) -> dict[str, Request]:
    """The precision of each group, in topological order: integer where its inputs are integer too."""
    integer: set[str] = set()
    precisions: dict[str, Request] = {}
    for group in groups:
        precisions[group.name] = _precision_of(group, integer, ranges, target, requests[group.name])
        if precisions[group.name].precision is Precision.STATIC:
            integer.update(group.outputs)
    return precisions


def _precision_of(
    group: FusionGroup,
    integer: set[str],
    ranges: Mapping[str, Range],
    target: Target,
    requested: Request,
) -> Request:
    kernels = target.kernels
    precision, why = requested
    if precision is Precision.SHARED_SCALE:
        precision = Precision.STATIC
    if group.role is Role.FLOAT:
        return Request(in_float(group, precision), group.reason)
    if group.constants and not group.inputs and group.op_type == "Gather":
        # An embedding: the table is constant, the indices are the input.
        if precision is Precision.FLOAT:
            return Request(Precision.FLOAT, why or ASKED_FOR)
        if precision is Precision.STORED and kernels.folds_constants:
            return Request(Precision.STORED, EMBEDDING_UNFOLDED)
        if "Gather" in kernels.weight_only:
            return Request(Precision.WEIGHT_ONLY, EMBEDDING)
        return Request(Precision.FLOAT, no_kernel("weight_only", "Gather"))
    if not group.inputs:
        return Request(Precision.FLOAT, Reason(Cause.OPERATOR, "all its inputs are constant"))
    if precision is Precision.FLOAT:
        return Request(Precision.FLOAT, why or ASKED_FOR)
    if group.role is Role.HEAVY:
        return _heavy_precision(group, ranges, target, precision, why)
    if precision is not Precision.STATIC:
        return Request(
            in_float(group, precision), why or Reason(Cause.OPERATOR, f"has no {precision} kernel")
        )
    missing = [name for name in group.inputs if name not in integer]
    if missing:
        reason = Reason(Cause.NEIGHBOURS, f"its input {missing[0]!r} is float", "an input is float")
        return Request(in_float(group, precision), reason)
    unmeasured = [name for name in group.outputs if name not in ranges and group.role is Role.LIGHT]
    if unmeasured:
        return Request(in_float(group, precision), _unmeasured("its output ", unmeasured[0]))
    return Request(Precision.STATIC)


def _unmeasured(what: str, value: str) -> Reason:
    return Reason(Cause.UNMEASURED, f"no sample reached {what}{value!r}")


def in_float(group: FusionGroup, requested: Precision) -> Precision:
    """The precision of a group that computes in float: STORED where it has initializers to store as int8."""
    return Precision.STORED if group.stored and requested is not Precision.FLOAT else Precision.FLOAT


def _heavy_precision(
    group: FusionGroup, ranges: Mapping[str, Range], target: Target, precision: Precision, why: Reason
) -> Request:
    """The precision of a convolution, matrix product or recurrent operator.

    ``why``, the reason of the request, is kept where the request is met or was for stored weights. Where
    integer precision was requested and another results, the reason is that of the plan.
    """
    kernels, op = target.kernels, group.op_type
    requested_integer = precision in INTEGER_PRECISIONS
    if precision is Precision.STATIC and op in kernels.integer and op not in RECURRENT_OPS:
        unmeasured = [name for name in (*group.inputs, *group.outputs) if name not in ranges]
        if unmeasured:
            return Request(Precision.FLOAT, _unmeasured("", unmeasured[0]))
        return Request(Precision.STATIC, why)
    refusal = no_kernel(precision, op)
    if group.weight is None:
        refusal = Reason(Cause.NO_KERNEL, f"two activations: no {precision} kernel")
    elif requested_integer and op in kernels.dynamic and op in DYNAMIC_OPS:
        no_static = Reason(Cause.NO_KERNEL, f"no static kernel for {op}", "no static kernel")
        return Request(Precision.DYNAMIC, why if precision is Precision.DYNAMIC else no_static)
    elif precision is Precision.STORED and op == "MatMul" and kernels.folds_constants:
        return Request(
            Precision.STORED, why
        )  # weight-only precision of other operators dequantizes at load anyway
    elif op in kernels.weight_only:
        stored = Reason(Cause.NO_KERNEL, f"no {precision} kernel for {op}; weights stored as int8")
        return Request(Precision.WEIGHT_ONLY, stored if requested_integer else why)
    return Request(Precision.FLOAT, refusal if requested_integer else why or refusal)
