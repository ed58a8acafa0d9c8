"""What the preparation of weights has found out before a plan is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgepack.quantization.weights.low_bit import FewBits


@dataclass(frozen=True, slots=True, eq=False)
class WeightPreparation:
    """How weights are to be stored where a unit is integer; the default is eight bits for all."""

    smoothing: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Factors by activation, see :mod:`edgepack.quantization.weights.smoothquant`."""
    narrow: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    """By static unit, the outputs that get weights of seven bits, see
    :mod:`edgepack.quantization.weights.saturation`."""
    few_bits: Mapping[str, FewBits] = field(default_factory=dict)
    """Units whose weights have fewer than eight bits, see :mod:`edgepack.quantization.weights.low_bit`."""


NOTHING_PREPARED = WeightPreparation()
