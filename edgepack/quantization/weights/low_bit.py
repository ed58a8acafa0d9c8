"""Weights of fewer than eight bits: which groups have them, and the scales that they take.

With few bits the largest weight must not decide on the scale: clipping it costs less than coarse steps for
all others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.config.recipe import Quantize
from edgepack.config.target import Target
from edgepack.errors import ConfigError
from edgepack.ir.scheme import QuantParams, QuantScheme
from edgepack.quantization.groups import FusionGroup, override_for
from edgepack.quantization.weights.matrix import has_rows

Floats = npt.NDArray[np.float32]

RATIOS = np.linspace(0.4, 1.2, 33, dtype=np.float32)
"""Of the range to the largest weight, that are tried."""


@dataclass(frozen=True, slots=True, eq=False)
class LowBit:
    """Of one group's weight: its bits, and scales like those of ``QuantParams`` where error chose them."""

    bits: int
    scale: Floats | None = None

    def scheme(self, eight: QuantScheme) -> QuantScheme:
        """The scheme with fewer bits; sums of such weights never saturate."""
        return replace(eight, bits=self.bits, saturates=False, reduce_range=False)

    def applied(self, params: QuantParams) -> QuantParams:
        """``params`` with the chosen scales."""
        return params if self.scale is None else replace(params, scale=self.scale)


@dataclass(frozen=True, slots=True)
class BitsOfGroups:
    """Groups with weights of fewer than eight bits, by name, and why others keep eight."""

    few: Mapping[str, LowBit]
    notes: tuple[str, ...] = ()


def bits_of_groups(
    model: ir.Model, groups: Sequence[FusionGroup], wanted: Quantize, target: Target
) -> BitsOfGroups:
    """What the recipe asks for, where ``target`` has it.

    Raises:
        ConfigError: an override asks for bits that the target does not have for the operator, or no weight of
            the model can have the bits that the recipe asks for.
    """
    nodes = {n.name: n for n in model.graph}
    few: dict[str, LowBit] = {}
    reasons: dict[str, None] = {}
    weighted = [u for u in groups if u.weight is not None]
    for group in weighted:
        said = override_for(group, (o for o in wanted.overrides if o.bits is not None))
        bits = wanted.weight_bits if said is None else said.bits
        if bits is None or bits == 8:
            continue
        reason = _refusal(group, nodes[group.name], bits, target)
        if reason is None:
            few[group.name] = LowBit(bits)
        elif said is not None:
            raise ConfigError(f"override: node {group.name!r}: {reason}")
        else:
            reasons[reason] = None
    if reasons and not few:
        raise ConfigError(f"weight_bits: {'; '.join(reasons)}; use `weight_bits: 8`")
    return BitsOfGroups(few, tuple(f"{reason}: 8 bits" for reason in reasons))


def wants_four_bits(wanted: Quantize) -> bool:
    """Whether a file may hold INT4 tensors, which exist from opset 21 on."""
    return wanted.weight_bits == 4 or any(o.bits == 4 for o in wanted.overrides)


def _refusal(group: FusionGroup, node: ir.Node, bits: int, target: Target) -> str | None:
    if not has_rows(node) or bits not in target.kernels.weight_bits.get(group.op_type, ()):
        return f"target {target.name!r} has no {bits}-bit weights for {group.op_type}"
    weight = node.inputs[1]
    if weight is not None and len(weight.uses()) > 1:
        return f"weight {group.weight!r} is read by several nodes"
    return None


def scale_by_error(
    weight: Floats, second: Floats | None, params: QuantParams, most: int
) -> npt.NDArray[np.float32]:
    """Scales with the least error of the outputs if each weight is rounded by itself.

    ``weight`` is [groups, outputs, K], ``second`` [groups, K, K] of its inputs, whose diagonal weighs the
    columns; all weigh the same without. Of the shape of ``params.scale``, whose scales cover ``most``.
    """
    groups, outputs, columns = weight.shape
    weights = np.ones((groups, columns), np.float32) if second is None else np.einsum("gii->gi", second)
    peak = np.broadcast_to(params.scale.reshape(-1), (groups * outputs,)).reshape(groups, outputs, 1)
    errors = []
    for ratio in RATIOS:
        scale = peak * ratio
        lost = np.clip(np.rint(weight / scale), -most, most) * scale - weight
        errors.append(np.einsum("gok,gk->go", lost * lost, weights).reshape(-1))
    table = np.stack(errors)
    if params.axis is None:
        return np.asarray(params.scale * RATIOS[table.sum(1).argmin()], np.float32)
    return np.asarray(params.scale * RATIOS[table.argmin(0)], np.float32)
