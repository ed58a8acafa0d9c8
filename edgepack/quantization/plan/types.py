"""Types of a plan: the precision of each fusion group and the parameters of each quantized tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from edgepack.ir.scheme import QuantParams, QuantScheme
from edgepack.quantization.groups import FusionGroup
from edgepack.results import NO_REASON, Reason


class Precision(StrEnum):
    """How a group stores its weights and computes."""

    STATIC = "static"
    """Integer kernel between Q/DQ, ranges from calibration."""
    SHARED_SCALE = "tied"
    """Request for a Concat only: static, with one scale for its inputs and output where ranges allow it."""
    DYNAMIC = "dynamic"
    """Integer kernel, activation ranges computed at run time."""
    WEIGHT_ONLY = "weight_only"
    """Weights stored as int8, arithmetic in float."""
    STORED = "stored"
    """The same, with weights that the runtime dequantizes when it loads the file: as fast as float."""
    FLOAT = "float"


class Request(NamedTuple):
    """The precision requested for a group, and why."""

    precision: Precision
    reason: Reason = NO_REASON


Precisions = Mapping[str, Request]
"""Requests by the name of the group."""

INTEGER_PRECISIONS = frozenset({Precision.STATIC, Precision.DYNAMIC})
DYNAMIC_OPS = frozenset({"MatMul", "Gemm", "LSTM"})
"""Operators that can run with dynamic precision."""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Precision and parameters of one group; ``reason`` says why it has this precision."""

    group: FusionGroup
    precision: Precision
    reason: Reason = NO_REASON
    weight: QuantParams | None = None
    drop_activation: bool = False
    """Saturation of the quantized output already does what the Relu or Clip does."""
    added_channels: int = 0
    """Channel padding: channels of zeros added to the input of a convolution for the target's fast kernel."""
    reduced_range: tuple[bool, ...] = ()
    """Which outputs have seven-bit weights, so that sums do not saturate; none where empty."""
    smoothing: tuple[float, ...] = ()
    """SmoothQuant factors: each input channel is divided by its factor, its weights are multiplied by it."""
    bits: int = 8
    """Bits of the weight."""
    substituted: bool = False
    """Replaced by operators that the runtime computes faster, see
    :mod:`edgepack.quantization.rewrite.substitutions`."""
    stored: tuple[tuple[str, QuantParams], ...] = ()
    """Initializers of a group without an integer kernel that are stored as int8, see
    :mod:`edgepack.quantization.weights.stored_constants`."""


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """A plan for each group, and the parameters of each activation that gets a Q/DQ pair."""

    groups: tuple[GroupPlan, ...]
    activations: Mapping[str, QuantParams]
    activation_scheme: QuantScheme
    weight_scheme: QuantScheme

    def of(self, precision: Precision) -> list[GroupPlan]:
        """The groups with this ``precision``."""
        return [u for u in self.groups if u.precision is precision]
