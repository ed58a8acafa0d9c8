"""The precision of each group as it is asked for, where the target has it and its inputs allow it."""

from collections.abc import Mapping, Sequence

from edgepack.calibration.ranges import Range
from edgepack.config.target import Target
from edgepack.quantization.groups import (
    RECURRENT_OPS,
    Role,
    Unit,
    no_kernel,
)
from edgepack.quantization.plan.types import (
    DYNAMIC_OPS,
    INTEGER_METHODS,
    Method,
    Methods,
    Request,
)
from edgepack.results import Cause, Reason

ASKED_FOR = Reason(Cause.REQUEST, "asked for")
EMBEDDING = Reason(Cause.STORAGE, "embedding: int8 rows, dequantized after the look-up")
EMBEDDING_UNFOLDED = Reason(Cause.STORAGE, "embedding: int8 rows, unfolded when the file is loaded")


def first_sweep(
    units: Sequence[Unit],
    ranges: Mapping[str, Range],
    target: Target,
    methods: Methods,
) -> dict[str, Request]:
    """Each unit's method, sources first; ``integer`` are the values that an integer unit leaves."""
    integer: set[str] = set()
    forms: dict[str, Request] = {}
    for unit in units:
        forms[unit.name] = _form(unit, integer, ranges, target, methods[unit.name])
        if forms[unit.name].method is Method.STATIC:
            integer.update(unit.outputs)
    return forms


def _form(
    unit: Unit,
    integer: set[str],
    ranges: Mapping[str, Range],
    target: Target,
    requested: Request,
) -> Request:
    kernels = target.kernels
    method, why = requested
    if method is Method.TIED:
        method = Method.STATIC
    if unit.role is Role.FLOAT:
        return Request(in_float(unit, method), unit.reason)
    if unit.constants and not unit.inputs and unit.op_type == "Gather":
        # An embedding: the table is data, the indices come in.
        if method is Method.FLOAT:
            return Request(Method.FLOAT, why or ASKED_FOR)
        if method is Method.STORED and kernels.folds_constants:
            return Request(Method.STORED, EMBEDDING_UNFOLDED)
        if "Gather" in kernels.weight_only:
            return Request(Method.WEIGHT_ONLY, EMBEDDING)
        return Request(Method.FLOAT, no_kernel("weight_only", "Gather"))
    if not unit.inputs:
        return Request(Method.FLOAT, Reason(Cause.OPERATOR, "reads constants only"))
    if method is Method.FLOAT:
        return Request(Method.FLOAT, why or ASKED_FOR)
    if unit.role is Role.HEAVY:
        return _heavy_form(unit, ranges, target, method, why)
    if method is not Method.STATIC:
        return Request(in_float(unit, method), why or Reason(Cause.OPERATOR, f"has no {method} form"))
    missing = [name for name in unit.inputs if name not in integer]
    if missing:
        reason = Reason(Cause.NEIGHBOURS, f"its input {missing[0]!r} is float", "an input is float")
        return Request(in_float(unit, method), reason)
    unmeasured = [name for name in unit.outputs if name not in ranges and unit.role is Role.LIGHT]
    if unmeasured:
        return Request(in_float(unit, method), _unmeasured("its output ", unmeasured[0]))
    return Request(Method.STATIC)


def _unmeasured(what: str, value: str) -> Reason:
    return Reason(Cause.UNMEASURED, f"no sample reached {what}{value!r}")


def in_float(unit: Unit, asked: Method) -> Method:
    """The form of a unit that computes in float; float itself if asked for, or where nothing is to store."""
    return Method.STORED if unit.stored and asked is not Method.FLOAT else Method.FLOAT


def _heavy_form(
    unit: Unit, ranges: Mapping[str, Range], target: Target, method: Method, why: Reason
) -> Request:
    """``why``, the reason of the request, explains the form asked for, and float instead of stored weights.

    Where an integer form was asked for and another one results, the reason is that of the plan.
    """
    kernels, op = target.kernels, unit.op_type
    asked_integer = method in INTEGER_METHODS
    if method is Method.STATIC and op in kernels.integer and op not in RECURRENT_OPS:
        unmeasured = [name for name in (*unit.inputs, *unit.outputs) if name not in ranges]
        if unmeasured:
            return Request(Method.FLOAT, _unmeasured("", unmeasured[0]))
        return Request(Method.STATIC, why)
    no_form = no_kernel(method, op)
    if unit.weight is None:
        no_form = Reason(Cause.NO_KERNEL, f"two activations: no {method} form")
    elif asked_integer and op in kernels.dynamic and op in DYNAMIC_OPS:
        no_static = Reason(Cause.NO_KERNEL, f"no static kernel for {op}", "no static kernel")
        return Request(Method.DYNAMIC, why if method is Method.DYNAMIC else no_static)
    elif method is Method.STORED and op == "MatMul" and kernels.folds_constants:
        return Request(Method.STORED, why)  # of others the weights are unfolded anyway
    elif op in kernels.weight_only:
        stored = Reason(Cause.NO_KERNEL, f"no {method} kernel for {op}; weights stored as int8")
        return Request(Method.WEIGHT_ONLY, stored if asked_integer else why)
    return Request(Method.FLOAT, no_form if asked_integer else why or no_form)
