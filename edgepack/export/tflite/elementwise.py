"""Elementwise operators."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgepack.export.tflite.flatbuffer import Quant
from edgepack.export.tflite.layout import Order, Shape, arranged, native
from edgepack.export.tflite.linear import depthwise_affine
from edgepack.export.tflite.lowering import QMIN, Lowering
from edgepack.export.tflite.tasks import FLOAT, Output, Task, dtype_of, quant, stored_as
from edgepack.ir.model import constant, name_of
from edgepack.quantization.groups import activation_bounds

ARITHMETIC: Mapping[str, str] = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL", "Div": "DIV"}
EXTREMES: Mapping[str, str] = {"Max": "MAXIMUM", "Min": "MINIMUM"}
COMPARISONS: Mapping[str, str] = {"Equal": "EQUAL", "Greater": "GREATER", "Less": "LESS"}
UNARY: Mapping[str, str] = {
    "Abs": "ABS", "Ceil": "CEIL", "Cos": "COS", "Exp": "EXP", "Floor": "FLOOR", "Log": "LOG", "Neg": "NEG",
    "Round": "ROUND", "Sign": "SIGN", "Sin": "SIN", "Sqrt": "SQRT", "Relu": "RELU",
    "Sigmoid": "LOGISTIC", "Tanh": "TANH",
}  # fmt: skip
FIXED: Mapping[str, Quant] = {
    "Sigmoid": quant(1 / 256, -128),
    "Softmax": quant(1 / 256, -128),
    "Tanh": quant(1 / 128, 0),
    "LogSoftmax": quant(16 / 256, 127),
}
"""Output parameters that the int8 kernels require."""
GROUP = quant(1 / 255, -128)
"""Parameters of values between 0 and 1."""
LEAST_OF_SUM = 2.0**-9
"""Least scale of a constant relative to that of a sum; XNNPACK does not delegate half of it."""


def operands(low: Lowering, task: Task, *, integer: bool) -> tuple[list[int], Order]:
    """All inputs in one order of axes, with the rank of the output."""
    rank = len(low.shape(task.output))
    order = low.common_order(task.node.inputs, rank)
    return [low.read(v, order, integer=integer) for v in task.node.inputs if v is not None], order


def arithmetic(low: Lowering, task: Task) -> None:
    """Add, Sub, Mul, Div; an int8 Div, which has no kernel, as a float island."""
    op = ARITHMETIC[task.node.op_type]
    if op == "DIV" and task.integer:
        _in_float(low, task, "there is no int8 kernel for a division", lambda t: arithmetic(low, t))
        return
    tensors, order = operands(low, task, integer=task.integer)
    if task.integer and op in ("ADD", "SUB"):
        least = float(low.planned(task.output).scale[0]) * LEAST_OF_SUM
        tensors = [_coarser(low, tensor, least) for tensor in tensors]
    low.write(task, op, tensors, Output(order), fuses=True)


def _coarser(low: Lowering, tensor: int, least: float) -> int:
    """A constant with a larger scale, where the delegate does not take its own."""
    source = low.graph.tensors[tensor]
    if source.data is None or source.quant is None or source.quant.scale[0] >= least:
        return tensor
    zero_point = int(source.quant.zero_point[0])
    real = (source.data.astype(np.float32) - zero_point) * source.quant.scale[0]
    kind = quant(least, zero_point)
    return low.constant(stored_as(real, kind), source.name, kind)


def extreme(low: Lowering, task: Task) -> None:
    """Max and Min of any number of inputs; int8 ones under the parameters of the output."""
    op = EXTREMES[task.node.op_type]
    tensors, order = operands(low, task, integer=task.integer)
    if task.integer:
        tensors = [low.requantize(t, low.planned(task.output)) for t in tensors]
    shape = arranged(low.shape(task.output), order)
    kind = low.planned(task.output) if task.integer else dtype_of(task.output)
    result = tensors[0]
    for other in tensors[1:]:
        result = low.emit(op, [result, other], shape, kind, name_of(task.output))
    low.put(task.output, result, order)


def comparison(low: Lowering, task: Task) -> None:
    """Equal, Greater, Less, in the types of the graph."""
    tensors, order = operands(low, task, integer=False)
    low.write(task, COMPARISONS[task.node.op_type], tensors, Output(order))


def where(low: Lowering, task: Task) -> None:
    """Where as SELECT_V2; both choices under the parameters of the output."""
    node, rank = task.node, len(low.shape(task.output))
    order = low.common_order(node.inputs[1:], rank)
    mask = low.read(node.inputs[0], order, integer=False)
    choices = [low.read(v, order, integer=task.integer) for v in node.inputs[1:]]
    if task.integer:
        choices = [low.requantize(t, low.planned(task.output)) for t in choices]
    low.write(task, "SELECT_V2", [mask, *choices], Output(order))


def unary(low: Lowering, task: Task) -> None:
    """Unary functions with their own kernel."""
    op = task.node.op_type
    tensors, order = operands(low, task, integer=task.integer)
    low.write(task, UNARY[op], tensors, Output(order, kind=FIXED.get(op) if task.integer else None))


def leaky_relu(low: Lowering, task: Task) -> None:
    """LeakyRelu."""
    tensors, order = operands(low, task, integer=task.integer)
    low.write(
        task,
        "LEAKY_RELU",
        tensors,
        Output(order),
        options={"alpha": task.node.attributes.get_float("alpha", 0.01)},
    )


def prelu(low: Lowering, task: Task) -> None:
    """PRelu; the slope is symmetric int8, as the kernels require."""
    source, slope = task.node.inputs[0], task.node.inputs[1]
    array = constant(slope)
    if array is None:
        raise task.refuse("its slope is computed at run time")
    rank = len(low.shape(source))
    order = low.common_order([source], rank)
    tensor = low.read(source, order, integer=task.integer)
    # The kernel takes the slope without the batch axis, but with all other axes of size 1.
    wide = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if wide.shape[0] != 1 or order[0] != 0:
        order = native(rank)
        tensor = low.read(source, order, integer=task.integer)
    stored = np.ascontiguousarray(wide.transpose(order)[0])
    kind = None
    if task.integer:
        kind = quant(max(float(np.abs(stored).max()) / 127, 1e-12), 0)
        stored = stored_as(stored, kind)
    alpha = low.constant(stored, name_of(slope), kind)  # type: ignore[arg-type]
    low.write(task, "PRELU", [tensor, alpha], Output(order))


def clip(low: Lowering, task: Task) -> None:
    """A Clip or Relu that is not fused: by saturation of the output's parameters, else with bounds."""
    bounds = activation_bounds(task.node)
    for value in task.node.inputs[1:]:
        if value is not None and constant(value) is None:
            raise task.refuse("its bounds are computed at run time")
    source = task.node.inputs[0]
    order = low.common_order([source], len(low.shape(source)))
    tensor = low.read(source, order, integer=task.integer)
    if task.integer:
        tensor = low.requantize(tensor, low.planned(task.output))
    low.put(task.output, low.clamp(tensor, bounds), order)


def hard_sigmoid(low: Lowering, task: Task) -> None:
    """``clip(alpha x + beta, 0, 1)``; the clip is the saturation of parameters for the range from 0 to 1.

    Multiplying by alpha only changes the scale of the int8 values, so that one rounding is left.
    """
    alpha = task.node.attributes.get_float("alpha", 0.2)
    beta = task.node.attributes.get_float("beta", 0.5)
    tensors, order = operands(low, task, integer=task.integer)
    if alpha <= 0:
        raise task.refuse("its alpha is not positive")
    kind = GROUP
    if task.integer:
        planned = low.planned(task.output)
        inside = int(planned.zero_point[0]) == QMIN and float(planned.scale[0]) <= 1 / 254.5
        kind = planned if inside else GROUP
    tensor = _hard_sigmoid(low, tensors[0], alpha, beta, name_of(task.output), kind)
    if task.integer:
        tensor = low.requantize(tensor, low.planned(task.output))
    low.put(task.output, tensor, order)


def hard_swish(low: Lowering, task: Task) -> None:
    """HardSwish; in int8 as ``x * HardSigmoid(x)``, since XNNPACK has no int8 HARD_SWISH."""
    tensors, order = operands(low, task, integer=task.integer)
    if not task.integer:
        low.write(task, "HARD_SWISH", tensors, Output(order))
        return
    gate = _hard_sigmoid(low, tensors[0], 1 / 6, 0.5, f"{name_of(task.output)}_gate", GROUP)
    low.write(task, "MUL", [tensors[0], gate], Output(order))


def _hard_sigmoid(low: Lowering, tensor: int, alpha: float, beta: float, name: str, kind: Quant) -> int:
    source = low.graph.tensors[tensor]
    shape, ones = source.shape, (1,) * len(source.shape)
    factor, offset = np.full(ones, alpha, np.float32), np.full(ones, beta, np.float32)
    if source.quant is None:
        scaled = low.emit("MUL", [tensor, low.constant(factor, "alpha")], shape, FLOAT, name)
        moved = low.emit("ADD", [scaled, low.constant(offset, "beta")], shape, FLOAT, name)
        return low.clamp(moved, (0.0, 1.0))
    inner = quant(float(source.quant.scale[0]) * alpha, int(source.quant.zero_point[0]))
    scaled = low.emit("MUL", [tensor, _exact(low, factor, "alpha")], shape, inner, name)
    return low.emit("ADD", [scaled, _exact(low, offset, "beta")], shape, kind, name)


def _exact(low: Lowering, array: "np.typing.NDArray[np.float32]", name: str) -> int:
    """A scalar constant that is exact in int8."""
    kind = quant(max(abs(float(array.flat[0])) / 127, 1e-12), 0)
    return low.constant(stored_as(array, kind), name, kind)


def batch_normalization(low: Lowering, task: Task) -> None:
    """``a x + b`` per channel, as a depthwise 1x1 convolution in int8, as MUL and ADD in float."""
    node = task.node
    found = [constant(v) for v in node.inputs[1:5]]
    if any(array is None for array in found):
        raise task.refuse("its parameters are computed at run time")
    scale, bias, mean, variance = (np.asarray(array, np.float64) for array in found)
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    affine(low, task, factor, bias - mean * factor)


def affine(
    low: Lowering, task: Task, factor: "np.typing.NDArray[np.float64]", shift: "np.typing.NDArray[np.float64]"
) -> None:
    """``factor x + shift``, both per channel (axis 1)."""
    rank = len(low.shape(task.output))
    shape = (1, -1, *(1,) * (rank - 2))
    if task.integer and rank in (3, 4):
        depthwise_affine(low, task, factor, shift)
        return
    source = task.node.inputs[0]
    order = low.common_order([source], rank)

    def compute(inner: Task) -> None:
        tensor = low.read(source, order, integer=False)
        target = arranged(low.shape(inner.output), order)
        for op, array in (("MUL", factor), ("ADD", shift)):
            operand = np.ascontiguousarray(array.astype(np.float32).reshape(shape).transpose(order))
            right = low.constant(operand, f"{inner.node.name}_{op.lower()}")
            tensor = low.emit(op, [tensor, right], target, FLOAT, name_of(inner.output))
        low.put(inner.output, tensor, order)

    if task.integer:
        _in_float(low, task, "no int8 kernel for this rank", compute)
    else:
        compute(task)


def _in_float(low: Lowering, task: Task, reason: str, compute: Callable[[Task], None]) -> None:
    """An int8 group as a float island; int8 consumers get a QUANTIZE."""
    low.islands[task.plan.group.name] = reason
    compute(Task(task.node, task.plan, task.rounded, task.output, task.bounds, False))


# --- functions composed of other operators, in float ----------------------------------------------------


def compose(low: Lowering, op: str, inputs: Sequence[int], shape: Shape, name: str, **options: float) -> int:
    """A float operator of a composition."""
    return low.emit(op, inputs, shape, FLOAT, name, **options)


def number(low: Lowering, value: float, rank: int) -> int:
    """A float scalar constant."""
    return low.constant(np.full((1,) * rank, value, np.float32), "number")


def power(low: Lowering, task: Task) -> None:
    """Pow: MUL for squares, SQRT for square roots, else POW."""
    exponent = constant(task.node.inputs[1])
    whole = float(exponent.flat[0]) if exponent is not None and exponent.size == 1 else None
    rank = len(low.shape(task.output))
    order = low.common_order(task.node.inputs, rank)
    base = low.read(task.node.inputs[0], order, integer=False)
    if whole == 2.0:
        low.write(task, "MUL", [base, base], Output(order))
    elif whole == 0.5:
        low.write(task, "SQRT", [base], Output(order))
    else:
        right = task.node.inputs[1]
        if exponent is not None and exponent.dtype != np.float32:
            wide = exponent.astype(np.float32).reshape((1,) * (rank - exponent.ndim) + exponent.shape)
            low.write(task, "POW", [base, low.constant(wide.transpose(order), "exponent")], Output(order))
        else:
            low.write(task, "POW", [base, low.read(right, order, integer=False)], Output(order))


def reciprocal(low: Lowering, task: Task) -> None:
    """Reciprocal as a division."""
    tensors, order = operands(low, task, integer=False)
    low.write(task, "DIV", [number(low, 1.0, len(order)), tensors[0]], Output(order))


# Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26: absolute error below 1.5e-7.
_ERF_P = 0.3275911
_ERF_A = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def erf(low: Lowering, task: Task) -> None:
    """Erf, which has no kernel: ``sign(x) (1 - t p(t) exp(-x²))`` with ``t = 1 / (1 + 0.3275911 |x|)``."""
    tensors, order = operands(low, task, integer=False)
    tensor = erf_tensor(low, tensors[0], name_of(task.output))
    low.put(task.output, tensor, order)


def erf_tensor(low: Lowering, x: int, name: str) -> int:
    """The error function of a float tensor."""
    shape = low.graph.tensors[x].shape
    rank = len(shape)

    def apply(op: str, *inputs: int) -> int:
        return compose(low, op, inputs, shape, name)

    def constant_(value: float) -> int:
        return number(low, value, rank)

    size = apply("ABS", x)
    t = apply("DIV", constant_(1.0), apply("ADD", apply("MUL", size, constant_(_ERF_P)), constant_(1.0)))
    polynomial = apply("MUL", t, constant_(_ERF_A[0]))
    for factor in _ERF_A[1:]:
        polynomial = apply("MUL", apply("ADD", polynomial, constant_(factor)), t)
    bell = apply("EXP", apply("MUL", apply("MUL", x, x), constant_(-1.0)))
    rest = apply("SUB", constant_(1.0), apply("MUL", polynomial, bell))
    # The sign without SIGN, which not all 2.14 runtimes have: x / max(|x|, tiny), which is 0 at 0.
    sign = apply("DIV", x, apply("MAXIMUM", size, constant_(1e-30)))
    return apply("MUL", rest, sign)


def gelu(low: Lowering, task: Task) -> None:
    """Gelu: ``x (1 + erf(x / √2)) / 2``, or its approximation by tanh."""
    tensors, order = operands(low, task, integer=False)
    x, name, rank = tensors[0], name_of(task.output), len(order)
    shape = low.graph.tensors[x].shape

    def apply(op: str, *inputs: int) -> int:
        return compose(low, op, inputs, shape, name)

    if task.node.attributes.get_string("approximate", "none") == "tanh":
        cube = apply("MUL", apply("MUL", x, x), x)
        inner = apply("ADD", x, apply("MUL", cube, number(low, 0.044715, rank)))
        bent = apply("TANH", apply("MUL", inner, number(low, float(np.sqrt(2 / np.pi)), rank)))
    else:
        bent = erf_tensor(low, apply("MUL", x, number(low, float(np.sqrt(0.5)), rank)), name)
    half = apply("MUL", x, number(low, 0.5, rank))
    low.put(task.output, apply("MUL", half, apply("ADD", bent, number(low, 1.0, rank))), order)


def softplus(low: Lowering, task: Task) -> None:
    """Softplus: ``max(x, 0) + log(1 + exp(-|x|))``, which does not overflow."""
    tensors, order = operands(low, task, integer=False)
    x, name, rank = tensors[0], name_of(task.output), len(order)
    shape = low.graph.tensors[x].shape

    def apply(op: str, *inputs: int) -> int:
        return compose(low, op, inputs, shape, name)

    small = apply("EXP", apply("MUL", apply("ABS", x), number(low, -1.0, rank)))
    log = apply("LOG", apply("ADD", small, number(low, 1.0, rank)))
    low.put(task.output, apply("ADD", apply("RELU", x), log), order)


def elu(low: Lowering, task: Task) -> None:
    """Elu with alpha 1."""
    if task.node.attributes.get_float("alpha", 1.0) != 1.0:
        raise task.refuse("ELU of TFLite has alpha 1")
    tensors, order = operands(low, task, integer=False)
    low.write(task, "ELU", tensors, Output(order))
