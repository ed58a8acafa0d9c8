"""Types of quantization: element types, granularity, schemes and parameters."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt


class QuantType(StrEnum):
    """An integer element type, with its range of values."""

    INT8 = "int8"
    UINT8 = "uint8"
    INT16 = "int16"
    UINT16 = "uint16"
    INT32 = "int32"

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """The NumPy type of stored values."""
        return np.dtype(self.value)

    @property
    def qmin(self) -> int:
        """The smallest stored value."""
        return int(np.iinfo(self.value).min)

    @property
    def qmax(self) -> int:
        """The largest stored value."""
        return int(np.iinfo(self.value).max)


class Granularity(StrEnum):
    """How many scales a weight has."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How one kind of tensor (weights or activations) is quantized.

    For weights: ``reduce_range`` reduces all to 7 bits; ``saturates`` says that pairs of u8 × s8 products
    saturate at 16 bits, as on x86 without VNNI, so that output channels whose sums would saturate are reduced
    to 7 bits; ``bits`` below eight limits stored values to the range of so many bits.
    """

    type: QuantType
    symmetric: bool
    granularity: Granularity = Granularity.PER_TENSOR
    reduce_range: bool = False
    saturates: bool = False
    bits: int = 8


@dataclass(frozen=True, slots=True, eq=False)
class QuantParams:
    """``real = (stored - zero_point) * scale``.

    ``scale`` float32 and ``zero_point`` (of the stored type) have shape ``[]`` per tensor, ``[channels]`` per
    channel; ``axis`` is the channel axis, ``None`` per tensor.
    """

    type: QuantType
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.integer]
    axis: int | None = None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, QuantParams)
            and (self.type, self.axis) == (other.type, other.axis)
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )

    __hash__ = None  # type: ignore[assignment]  # arrays are not hashable
