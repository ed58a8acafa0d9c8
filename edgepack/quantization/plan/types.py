"""What a plan consists of: the precision of each fusion group and the parameters of each quantized tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from edgepack.ir.scheme import QuantParams, QuantScheme
from edgepack.quantization.groups import FusionGroup
from edgepack.results import NO_REASON, Reason


class Precision(StrEnum):
    """The form that a group takes."""

    STATIC = "static"
    """Integer kernel between Q/DQ with calibrated ranges."""
    SHARED_SCALE = "tied"
    """Asked of a concatenation: static, with one scale for all that it reads and gives where that will do."""
    DYNAMIC = "dynamic"
    """Integer kernel, activation range found at run time."""
    WEIGHT_ONLY = "weight_only"
    """Weights stored as int8, arithmetic in float."""
    STORED = "stored"
    """The same, and the runtime makes floats of them when it loads the file: as fast as float."""
    FLOAT = "float"


class Request(NamedTuple):
    """The precision that is asked of a group, and why."""

    precision: Precision
    reason: Reason = NO_REASON


Precisions = Mapping[str, Request]
"""What is asked of each group, by its name."""

INTEGER_PRECISIONS = frozenset({Precision.STATIC, Precision.DYNAMIC})
DYNAMIC_OPS = frozenset({"MatMul", "Gemm", "LSTM"})
"""Operators that have a dynamic form at all."""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group's form; ``reason`` says why it is not integer, or why it takes the form it has."""

    group: FusionGroup
    precision: Precision
    reason: Reason = NO_REASON
    weight: QuantParams | None = None
    drop_activation: bool = False
    """The Relu or Clip is implied by the saturation of the integers that follow."""
    added_channels: int = 0
    """Channels of zeros that the input of a convolution gets, for the target's fast kernel."""
    reduced_range: tuple[bool, ...] = ()
    """Which outputs have weights of seven bits, lest sums saturate; none where empty."""
    smoothing: tuple[float, ...] = ()
    """What each input channel of a dynamic product is divided by, and its weights multiplied with."""
    bits: int = 8
    """Of the weight: stored integers keep to the range of so many."""
    substituted: bool = False
    """Written as operators that the runtime is faster at, see
    :mod:`edgepack.quantization.rewrite.substitutions`."""
    stored: tuple[tuple[str, QuantParams], ...] = ()
    """Constants of a group without an integer form that are stored all the same: see :mod:`.stored`."""


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """All decisions: a plan for each group, and the parameters of each activation that gets a Q/DQ pair."""

    groups: tuple[GroupPlan, ...]
    activations: Mapping[str, QuantParams]
    activation_scheme: QuantScheme
    weight_scheme: QuantScheme

    def of(self, precision: Precision) -> list[GroupPlan]:
        """The groups that take ``precision``."""
        return [u for u in self.groups if u.precision is precision]
