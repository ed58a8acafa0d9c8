"""Results of weight preparation that a plan uses."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgepack.quantization.weights.low_bit import LowBit


@dataclass(frozen=True, slots=True, eq=False)
class WeightPreparation:
    """How the weights of quantized groups are stored; by default eight bits for all."""

    smoothing: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """SmoothQuant factors by activation, see :mod:`edgepack.quantization.weights.smoothquant`."""
    reduced_range: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    """By static group, the outputs whose weights have reduced range (seven bits), see
    :mod:`edgepack.quantization.weights.saturation`."""
    low_bit: Mapping[str, LowBit] = field(default_factory=dict)
    """Low-bit weights (fewer than eight) by group, see :mod:`edgepack.quantization.weights.low_bit`."""


NOTHING_PREPARED = WeightPreparation()
