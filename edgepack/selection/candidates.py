"""Candidates: whole-model ones, and variations that change the precision of similar fusion groups."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from edgepack.config.target import Target
from edgepack.quantization.groups import FusionGroup, Role
from edgepack.quantization.plan.types import Precision, Precisions, QuantPlan, Request
from edgepack.results import NO_REASON, Cause, Reason

FLOAT_HERE = Reason(Cause.CANDIDATE, "computes in float in the chosen candidate")


class WholeModel(StrEnum):
    """Candidates with one rule for the whole model; the value is the name in reports."""

    STATIC = "static"
    STATIC_AND_DYNAMIC = "static and dynamic"
    DYNAMIC = "dynamic"
    WEIGHT_ONLY = "weight_only"
    STORED = "stored"
    FLOAT = "float"

    @property
    def method(self) -> Precision | None:
        """The precision that all heavy groups have; ``None`` where they have several."""
        return None if self is WholeModel.STATIC_AND_DYNAMIC else Precision(self.value)


@dataclass(frozen=True, slots=True)
class CandidateName:
    """The content of a candidate; its text is the name in reports."""

    whole: WholeModel
    varied: tuple[str, ...] = ()
    """Labels of the variations that were accepted, in order."""
    changed: tuple[tuple[str, Precision], ...] = ()
    """Single groups in another precision."""

    def __str__(self) -> str:
        """``static, last group in float; with a float, b weight_only and 3 more``."""
        name = ", ".join([self.whole, *self.varied])
        if not self.changed:
            return name
        shown = ", ".join(f"{group} {method}" for group, method in self.changed[:2])
        more = f" and {len(self.changed) - 2} more" if len(self.changed) > 2 else ""
        return f"{name}; with {shown}{more}"

    @property
    def is_whole(self) -> bool:
        """Whether one rule holds for the whole model, without exceptions."""
        return not (self.varied or self.changed)

    def vary(self, label: str) -> "CandidateName":
        """The name with one more variation."""
        return replace(self, varied=(*self.varied, label))

    def change(self, groups: Sequence[tuple[str, Precision]]) -> "CandidateName":
        """The name with these single groups in other precisions; replaces earlier single groups."""
        return replace(self, changed=tuple(groups))


@dataclass(frozen=True, slots=True)
class Variation:
    """Similar groups, and the precision that they are tried in together."""

    label: str
    groups: tuple[str, ...]
    method: Precision


def whole_model_methods(
    groups: Sequence[FusionGroup], target: Target
) -> dict[WholeModel, dict[str, Precision]]:
    """The whole-model candidates that differ on this model: precision by operator type, by candidate."""
    kernels = target.kernels
    heavy = heavy_types(groups)
    weighted = {u.op_type for u in groups if u.weight is not None}
    candidates: dict[WholeModel, dict[str, Precision]] = {}
    static = heavy & set(kernels.integer)
    dynamic = weighted & set(kernels.dynamic)
    if static:
        candidates[WholeModel.STATIC] = dict.fromkeys(heavy, Precision.STATIC)
    if dynamic and static - dynamic:
        candidates[WholeModel.STATIC_AND_DYNAMIC] = {
            op: Precision.DYNAMIC if op in dynamic else Precision.STATIC for op in heavy
        }
    if dynamic:
        candidates[WholeModel.DYNAMIC] = {
            op: Precision.DYNAMIC if op in dynamic else Precision.WEIGHT_ONLY for op in heavy
        }
    if weighted & set(kernels.weight_only) or any(is_table(u) for u in groups):
        candidates[WholeModel.WEIGHT_ONLY] = dict.fromkeys(heavy, Precision.WEIGHT_ONLY)
    if kernels.folds_constants and any(
        (u.op_type == "MatMul" and u.weight) or is_table(u) or u.stored for u in groups
    ):
        candidates[WholeModel.STORED] = dict.fromkeys(heavy, Precision.STORED)
    candidates[WholeModel.FLOAT] = dict.fromkeys(heavy, Precision.FLOAT)
    return candidates


def heavy_types(groups: Sequence[FusionGroup]) -> set[str]:
    """Operator types of the groups that have weights or matrix products."""
    return {u.op_type for u in groups if u.role is Role.HEAVY}


def is_table(group: FusionGroup) -> bool:
    """Whether the group is an embedding: a Gather from an initializer."""
    return group.op_type == "Gather" and bool(group.constants)


def methods_of(
    groups: Sequence[FusionGroup], whole: WholeModel, by_type: Mapping[str, Precision], fixed: Precisions
) -> dict[str, Request]:
    """Precision by group: what the recipe sets, else by operator type; light groups follow the heavy ones."""
    in_float = Precision.FLOAT if whole is WholeModel.FLOAT else Precision.STORED
    static = whole in (WholeModel.STATIC, WholeModel.STATIC_AND_DYNAMIC)
    light = Precision.STATIC if static else in_float
    table = in_float if whole in (WholeModel.FLOAT, WholeModel.STORED) else Precision.WEIGHT_ONLY
    methods = {}
    for group in groups:
        method = table if is_table(group) else by_type.get(group.op_type, light)
        here = method is Precision.FLOAT or (group.role is not Role.HEAVY and method is light is in_float)
        methods[group.name] = fixed.get(group.name, Request(method, FLOAT_HERE if here else NO_REASON))
    return methods


def variations(
    groups: Sequence[FusionGroup], plan: QuantPlan, *, folds_constants: bool
) -> Iterator[Variation]:
    """Similar groups in float, one kind after another, then every Concat with one shared scale.

    Weights of groups that compute in float stay stored as int8, which costs no time.
    """
    taken = {u.group.name for u in plan.groups if u.precision is not Precision.FLOAT and not u.stored}
    tables: dict[str, list[str]] = {}
    kinds: dict[str, list[str]] = {}
    order: dict[tuple[bool, str], None] = {}
    for group in groups:
        table = is_table(group)
        if group.name not in taken or (group.role is Role.MOVE and not table):
            continue
        label = f"table {group.name}" if table else group.kind
        (tables if table else kinds).setdefault(label, []).append(group.name)
        order[table, label] = None
    heavy = [u.name for u in groups if u.role is Role.HEAVY and u.name in taken]
    unfolded = Precision.STORED if folds_constants else Precision.FLOAT
    for table, label in order:
        names = (tables if table else kinds)[label]
        if names != heavy:  # all heavy groups in float are a whole-model candidate already
            yield Variation(f"{label} in float", tuple(names), unfolded if table else Precision.WEIGHT_ONLY)
    if len(heavy) > 2:
        yield Variation("first group in float", (heavy[0],), Precision.WEIGHT_ONLY)
        yield Variation("last group in float", (heavy[-1],), Precision.WEIGHT_ONLY)
    static = {u.group.name for u in plan.of(Precision.STATIC)}
    concats = [u.name for u in groups if u.op_type == "Concat" and u.role is Role.LIGHT and u.name in static]
    if concats:
        yield Variation("Concat on one scale", tuple(concats), Precision.SHARED_SCALE)
