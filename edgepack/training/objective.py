"""The distillation objective: which values of student and teacher are compared, and the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from edgepack.config.training import Tune
from edgepack.errors import ConfigError, did_you_mean
from edgepack.ir.arrays import Array
from edgepack.ir.model import constant, name_of
from edgepack.training.weights import PRODUCTS

SOFTMAXES = frozenset({"Softmax", "LogSoftmax"})
CONTINUED = frozenset(
    {"Add", "BatchNormalization", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul"}
    | {"PRelu", "Relu", "Sigmoid"}
)
"""Consumers of a convolution that does not end a block."""
CLAMPS = frozenset({"Clip", "Relu"})
"""Operators that QuantizeLinear can absorb by saturation."""
FEWEST_CLASSES = 3
"""Smallest number of columns of a MatMul or Gemm output that counts as logits; two may be coordinates."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A value of the student and the teacher's value that it should match."""

    mine: str
    teachers: str
    classes: bool = False
    """Whether they are logits along the last axis, compared as distributions."""


@dataclass(frozen=True, slots=True)
class Objective:
    """All compared pairs."""

    outputs: tuple[Pair, ...]
    features: tuple[Pair, ...]

    @property
    def mine(self) -> list[str]:
        """Values of the student that the loss needs."""
        return list(dict.fromkeys(p.mine for p in (*self.outputs, *self.features)))

    @property
    def teachers(self) -> list[str]:
        """Values of the teacher that the loss needs."""
        return list(dict.fromkeys(p.teachers for p in (*self.outputs, *self.features)))


def choose_objective(
    model: ir.Model, teacher: ir.Model, settings: Tune, float_model: ir.Model | None = None
) -> Objective:
    """Compare logits before a final Softmax, other outputs directly, and features by name.

    Where ``model`` is the quantized graph of ``float_model``, features are chosen on ``float_model``. An
    activation that QuantizeLinear absorbs has passed its name to the input of QuantizeLinear; the output of
    DequantizeLinear is compared instead.

    Raises:
        ConfigError: outputs do not match, or the feature map names values that do not exist.
    """
    outputs = []
    theirs = [v for v in teacher.graph.outputs if _is_float(v)]
    mine = [v for v in model.graph.outputs if _is_float(v)]
    if not mine or len(mine) != len(theirs):
        raise ConfigError(
            f"tune: the model has {len(mine)} float outputs and its teacher {len(theirs)}; "
            "give a teacher with the same outputs"
        )
    for a, b in zip(mine, theirs, strict=True):
        (inner_a, classes_a), (inner_b, classes_b) = _logits(a), _logits(b)
        both = classes_a and classes_b
        pair = (inner_a, inner_b) if both else (a, b)
        outputs.append(Pair(name_of(pair[0]), name_of(pair[1]), both))
    features = _features(model, teacher, settings, float_model or model) if settings.features else []
    done = {p.mine for p in outputs}
    return Objective(tuple(outputs), tuple(p for p in features if p.mine not in done))


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _logits(value: ir.Value) -> tuple[ir.Value, bool]:
    """The logits behind an output and whether it has logits; a final Softmax is skipped."""
    node = value.producer()
    if node is not None and node.op_type in SOFTMAXES and node.inputs[0] is not None:
        rank = len(value.shape) if value.shape is not None else 0
        axis = node.attributes.get_int("axis", -1)
        if axis == -1 or (rank and axis == rank - 1):
            return node.inputs[0], True
    last = node
    if node is not None and node.op_type == "Add":
        made = [v.producer() for v in node.inputs if v is not None and constant(v) is None]
        last = made[0] if len(made) == 1 else None
    shape = value.shape
    columns = shape[-1] if shape is not None and len(shape) == 2 else 0
    product = last is not None and last.op_type in PRODUCTS
    return value, product and isinstance(columns, int) and columns >= FEWEST_CLASSES


def _features(model: ir.Model, teacher: ir.Model, settings: Tune, float_model: ir.Model) -> list[Pair]:
    there = {name_of(v) for n in teacher.graph for v in n.outputs if v.name}
    here = {name_of(v) for n in model.graph for v in n.outputs if v.name}
    for a, b in settings.feature_map.items():
        for name, known, whose in ((a, here, "model"), (b, there, "teacher")):
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(f"tune: feature_map: the {whose} has no value {name!r}, {hint}")
    if settings.feature_map:
        return [Pair(a, b) for a, b in settings.feature_map.items()]
    ends = [name for name in block_ends(float_model) if name in here & there]
    if float_model is model:
        return [Pair(name, name) for name in ends]
    producers, clamped = ({name_of(v): n for n in m.graph for v in n.outputs} for m in (float_model, model))
    found = []
    for name in ends:
        dropped = producers[name].op_type in CLAMPS and clamped[name].op_type not in CLAMPS
        seen = _restored(clamped[name].outputs[0]) if dropped else name
        found += [Pair(seen, name)] if seen is not None else []
    return found


def _restored(value: ir.Value) -> str | None:
    """The output of ``value -> Q -> DQ``, if there is such a pair."""
    for store in (use.node for use in value.uses() if use.node.op_type == "QuantizeLinear"):
        for restore in (use.node for use in store.outputs[0].uses()):
            if restore.op_type == "DequantizeLinear":
                return name_of(restore.outputs[0])
    return None


def block_ends(model: ir.Model) -> list[str]:
    """Names of values at the ends of blocks.

    These are outputs of residual additions, outputs of convolutions without an activation (linear
    bottlenecks), and the input of the last MatMul or Gemm.
    """
    names = []
    for node in model.graph:
        value = node.outputs[0]
        consumers = [use.node for use in value.uses()]
        residual = (
            node.op_type == "Add" and _is_float(value) and all(constant(v) is None for v in node.inputs)
        )
        # The input of a Softmax may be scores with a mask of huge values.
        residual = residual and SOFTMAXES.isdisjoint(n.op_type for n in consumers)
        bottleneck = node.op_type == "Conv" and CONTINUED.isdisjoint(n.op_type for n in consumers)
        before_last = any(
            n.op_type in ("Gemm", "MatMul") and n.outputs[0].is_graph_output() for n in consumers
        )
        if (residual or bottleneck or before_last) and not value.is_graph_output():
            names.append(name_of(value))
    return names


def matching(
    objective: Objective, made: Mapping[str, Tensor], wanted: Mapping[str, Array], settings: Tune
) -> Objective:
    """The objective without features of different shapes (where channels were removed) and without integer
    values, such as positions.

    Raises:
        ConfigError: outputs, or features that the settings map to each other, differ in shape.
    """
    kept = []
    for pair in (*objective.outputs, *objective.features):
        mine, theirs = tuple(made[pair.mine].shape), wanted[pair.teachers].shape
        if pair not in objective.outputs and not made[pair.mine].is_floating_point():
            continue
        if mine == theirs:
            kept.append(pair)
        elif pair in objective.outputs or settings.feature_map:
            raise ConfigError(
                f"tune: {pair.mine!r} is {list(mine)} and the teacher's {pair.teachers!r} {list(theirs)}; "
                "only values of the same shape can be compared"
            )
    return Objective(objective.outputs, tuple(p for p in objective.features if p in kept))


def losses(
    objective: Objective,
    made: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    power: Mapping[str, float],
    settings: Tune,
    labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of the loss, multiplied by their weights.

    ``power`` has the variance of each teacher output; squared differences are divided by it. Logits are
    compared by the Kullback-Leibler divergence at a temperature T, times T² (Hinton et al., 2015).
    """
    parts = {}
    if settings.logits:
        each = [_output_loss(p, made, wanted, power, settings.temperature) for p in objective.outputs]
        parts["logits"] = settings.logits * torch.stack(each).mean()
    classes = [p for p in objective.outputs if p.classes]
    if settings.logits and settings.level and classes:
        each = [_level_loss(made[p.mine], wanted[p.teachers], power[p.teachers]) for p in classes]
        parts["level"] = settings.level * torch.stack(each).mean()
    if settings.features and objective.features:
        each = [_square(made[p.mine], wanted[p.teachers], power[p.teachers]) for p in objective.features]
        parts["features"] = settings.features * torch.stack(each).mean()
    if settings.labels and labels is not None:
        logits = made[objective.outputs[0].mine]
        parts["labels"] = settings.labels * functional.cross_entropy(logits, labels)
    return parts


def _square(a: Tensor, b: Tensor, power: float) -> Tensor:
    return functional.mse_loss(a, b) / max(power, 1e-12)


def _level_loss(a: Tensor, b: Tensor, power: float) -> Tensor:
    """Loss on the mean logit: the KL divergence does not depend on it, and Adam would let it drift."""
    return _square(a.mean(-1), b.mean(-1), power)


def _output_loss(
    pair: Pair, made: Mapping[str, Tensor], wanted: Mapping[str, Tensor], power: Mapping[str, float], t: float
) -> Tensor:
    mine, theirs = made[pair.mine], wanted[pair.teachers]
    if not pair.classes:
        return _square(mine, theirs, power[pair.teachers])
    rows = (functional.log_softmax(v.reshape(-1, v.shape[-1]) / t, -1) for v in (mine, theirs))
    return t * t * functional.kl_div(*rows, log_target=True, reduction="batchmean")


def agreement(pairs: Sequence[Pair], made: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Share of argmax decisions along the last axis that equal the teacher's, over all class outputs."""
    same = [made[p.mine].argmax(-1) == wanted[p.teachers].argmax(-1) for p in pairs if p.classes]
    return float(torch.cat([s.reshape(-1) for s in same]).double().mean()) if same else float("nan")
