"""The part of the TFLite schema that is written here, as tables: codes, versions, options.

Numbers are those of the public ``schema.fbs`` (schema version 3); they never change, since files carry them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

FILE_IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
PLACEHOLDER_CODE = 127
"""What the 8-bit code field holds for operators with a larger code."""

# fmt: off
TENSOR_TYPES: Mapping[np.dtype[np.generic], int] = {
    np.dtype(name): code for name, code in {
        "float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int64": 4, "bool": 6, "int16": 7, "int8": 9,
    }.items()
}
# fmt: on


class Padding(IntEnum):
    """How a window operator treats the border."""

    SAME = 0
    VALID = 1


class Activation(IntEnum):
    """Activation fused into an operator."""

    NONE = 0
    RELU = 1
    RELU_N1_TO_1 = 2
    RELU6 = 3


class MirrorMode(IntEnum):
    """Which mirror image MIRROR_PAD takes: without or with the border itself."""

    REFLECT = 0
    SYMMETRIC = 1


@dataclass(frozen=True, slots=True)
class Field:
    """A scalar in a table of options: its slot, type (``b`` int8, ``i`` int32, ``f`` float32, ``?`` bool)
    and the default, which is not stored."""

    slot: int
    kind: str
    default: float = 0


@dataclass(frozen=True, slots=True)
class OpSpec:
    """An operator: its code, the versions of its float and int8 kernels, its options.

    The versions are the lowest with these kernels, all within what a 2.14 runtime registers.
    ``options`` is the number of the options table in the union, 0 where the operator needs none.
    """

    code: int
    version: int = 1
    integer_version: int = 2
    options: int = 0
    fields: Mapping[str, Field] | None = None


def _fields(*layout: tuple[str, str] | tuple[str, str, float]) -> dict[str, Field]:
    """Fields in the order of their slots."""
    return {entry[0]: Field(slot, *entry[1:]) for slot, entry in enumerate(layout)}


_ACT = ("activation", "b")
_STRIDES = (("padding", "b"), ("stride_w", "i"), ("stride_h", "i"))
_DILATIONS = (("dilation_w", "i", 1), ("dilation_h", "i", 1))
_POOL = _fields(*_STRIDES, ("filter_w", "i"), ("filter_h", "i"), _ACT)
_REDUCE = _fields(("keep_dims", "?"))
_RESIZE = (("align_corners", "?"), ("half_pixel_centers", "?"))

OPS: Mapping[str, OpSpec] = {
    "ABS": OpSpec(101),
    "ADD": OpSpec(0, options=11, fields=_fields(_ACT)),
    "ARG_MAX": OpSpec(56, options=40, fields=_fields(("output_type", "b"))),
    "ARG_MIN": OpSpec(79, options=57, fields=_fields(("output_type", "b"))),
    "AVERAGE_POOL_2D": OpSpec(1, options=5, fields=_POOL),
    "BATCH_MATMUL": OpSpec(126, options=101, fields=_fields(("adj_x", "?"), ("adj_y", "?"))),
    "BROADCAST_TO": OpSpec(130, version=2),
    "CAST": OpSpec(53, options=37, fields=_fields(("in_type", "b"), ("out_type", "b"))),
    "CEIL": OpSpec(104, integer_version=1),
    "CONCATENATION": OpSpec(2, options=10, fields=_fields(("axis", "i"), _ACT)),
    "CONV_2D": OpSpec(3, integer_version=3, options=1, fields=_fields(*_STRIDES, _ACT, *_DILATIONS)),
    "COS": OpSpec(108, integer_version=1),
    "DEPTHWISE_CONV_2D": OpSpec(
        4,
        integer_version=3,
        options=2,
        fields=_fields(*_STRIDES, ("depth_multiplier", "i"), _ACT, *_DILATIONS),
    ),
    "DEPTH_TO_SPACE": OpSpec(5, options=94, fields=_fields(("block_size", "i"))),
    "DEQUANTIZE": OpSpec(6, version=2),
    "DIV": OpSpec(42, integer_version=1, options=29, fields=_fields(_ACT)),
    "ELU": OpSpec(111, integer_version=1),
    "EQUAL": OpSpec(71),
    "EXP": OpSpec(47, integer_version=2),
    "FLOOR": OpSpec(8, integer_version=1),
    "FULLY_CONNECTED": OpSpec(
        9,
        integer_version=4,
        options=8,
        fields=_fields(_ACT, ("weights_format", "b"), ("keep_num_dims", "?")),
    ),
    "GATHER": OpSpec(36, options=23, fields=_fields(("axis", "i"), ("batch_dims", "i"))),
    "GREATER": OpSpec(61),
    "HARD_SWISH": OpSpec(117, integer_version=1),
    "LEAKY_RELU": OpSpec(98, options=75, fields=_fields(("alpha", "f"))),
    "LESS": OpSpec(58),
    "LOG": OpSpec(73, integer_version=1),
    "LOGISTIC": OpSpec(14),
    "LOG_SOFTMAX": OpSpec(50),
    "MAXIMUM": OpSpec(55),
    "MAX_POOL_2D": OpSpec(17, options=5, fields=_POOL),
    "MEAN": OpSpec(40, options=27, fields=_REDUCE),
    "MINIMUM": OpSpec(57),
    "MIRROR_PAD": OpSpec(100, options=77, fields=_fields(("mode", "b"))),
    "MUL": OpSpec(18, options=21, fields=_fields(_ACT)),
    "NEG": OpSpec(59, integer_version=1),
    "PAD": OpSpec(34, options=22),
    "PADV2": OpSpec(60, options=43),
    "POW": OpSpec(78, integer_version=1),
    "PRELU": OpSpec(54, integer_version=1),
    "QUANTIZE": OpSpec(114, integer_version=2),
    "REDUCE_MAX": OpSpec(82, options=27, fields=_REDUCE),
    "REDUCE_MIN": OpSpec(89, options=27, fields=_REDUCE),
    "RELU": OpSpec(19),
    "RELU6": OpSpec(21),
    "RELU_N1_TO_1": OpSpec(20, integer_version=1),
    "RESHAPE": OpSpec(22, integer_version=1, options=17),
    "RESIZE_BILINEAR": OpSpec(
        23,
        version=3,
        integer_version=3,
        options=15,
        fields={n: Field(i + 2, k) for i, (n, k) in enumerate(_RESIZE)},
    ),
    "RESIZE_NEAREST_NEIGHBOR": OpSpec(97, version=3, integer_version=3, options=74, fields=_fields(*_RESIZE)),
    "ROUND": OpSpec(116, integer_version=1),
    "RSQRT": OpSpec(76),
    "SELECT_V2": OpSpec(123, integer_version=1),
    "SIGN": OpSpec(158, integer_version=1),
    "SIN": OpSpec(66, integer_version=1),
    "SLICE": OpSpec(65),
    "SOFTMAX": OpSpec(25, options=9, fields=_fields(("beta", "f"))),
    "SPACE_TO_DEPTH": OpSpec(26, options=19, fields=_fields(("block_size", "i"))),
    "SPLIT": OpSpec(49, options=35, fields=_fields(("num_splits", "i"))),
    "SQRT": OpSpec(75, integer_version=1),
    "STRIDED_SLICE": OpSpec(45, options=32, fields=_fields(("begin_mask", "i"), ("end_mask", "i"))),
    "SUB": OpSpec(41, options=28, fields=_fields(_ACT)),
    "SUM": OpSpec(74, options=27, fields=_REDUCE),
    "TANH": OpSpec(28),
    "TILE": OpSpec(69, integer_version=2),
    "TRANSPOSE": OpSpec(39, options=26),
    "TRANSPOSE_CONV": OpSpec(67, version=3, integer_version=3, options=49, fields=_fields(*_STRIDES)),
}
"""Every operator that the writer can emit."""
