"""Low-bit weights (fewer than eight): which groups have them, and their scales.

At low precision the scale should not cover the largest weight: clipping it costs less than coarse steps for
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
"""Candidate scales, as shares of the one that covers the largest weight."""


@dataclass(frozen=True, slots=True, eq=False)
class LowBit:
    """Bits of one group's weight, and its scales, as in ``QuantParams``, where the least error chose them."""

    bits: int
    scale: Floats | None = None

    def scheme(self, eight: QuantScheme) -> QuantScheme:
        """The scheme with these bits; sums of such weights never saturate."""
        return replace(eight, bits=self.bits, saturates=False, reduce_range=False)

    def applied(self, params: QuantParams) -> QuantParams:
        """``params`` with the chosen scales."""
        return params if self.scale is None else replace(params, scale=self.scale)


@dataclass(frozen=True, slots=True)
class BitsOfGroups:
    """Groups with low-bit weights, by name, and notes on why others keep eight bits."""

    low_bit: Mapping[str, LowBit]
    notes: tuple[str, ...] = ()


def bits_of_groups(
    model: ir.Model, groups: Sequence[FusionGroup], wanted: Quantize, target: Target
) -> BitsOfGroups:
    """The bits that the recipe requests, where ``target`` supports them.

    Raises:
        ConfigError: an override requests bits that the target does not support for the operator, or no weight
            of the model can have the bits that the recipe requests.
    """
    nodes = {n.name: n for n in model.graph}
    low_bit: dict[str, LowBit] = {}
    reasons: dict[str, None] = {}
    weighted = [u for u in groups if u.weight is not None]
    for group in weighted:
        override = override_for(group, (o for o in wanted.overrides if o.bits is not None))
        bits = wanted.weight_bits if override is None else override.bits
        if bits is None or bits == 8:
            continue
        reason = _refusal(group, nodes[group.name], bits, target)
        if reason is None:
            low_bit[group.name] = LowBit(bits)
        elif override is not None:
            raise ConfigError(f"override: node {group.name!r}: {reason}")
        else:
            reasons[reason] = None
    if reasons and not low_bit:
        raise ConfigError(f"weight_bits: {'; '.join(reasons)}; use `weight_bits: 8`")
    return BitsOfGroups(low_bit, tuple(f"{reason}: 8 bits" for reason in reasons))


def wants_four_bits(wanted: Quantize) -> bool:
    """Whether a file may hold INT4 tensors, which exist from opset 21 on."""
    return wanted.weight_bits == 4 or any(o.bits == 4 for o in wanted.overrides)


def _refusal(group: FusionGroup, node: ir.Node, bits: int, target: Target) -> str | None:
    if not has_rows(node) or bits not in target.kernels.weight_bits.get(group.op_type, ()):
        return f"target {target.name!r} has no {bits}-bit weights for {group.op_type}"
    weight = node.inputs[1]
    if weight is not None and len(weight.uses()) > 1:
        return f"weight {group.weight!r} has several consumers"
    return None


def scale_by_error(
    weight: Floats, second: Floats | None, params: QuantParams, most: int
) -> npt.NDArray[np.float32]:
    """Scales with the least output error under rounding to nearest; shaped like ``params.scale``.

    ``weight`` is [groups, outputs, K]; ``second`` [groups, K, K] are the second moments of its inputs, whose
    diagonal weights the columns (equally where ``None``). ``most``: the largest stored magnitude, covered by
    ``params.scale``.
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
