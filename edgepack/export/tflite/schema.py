"""The part of the TFLite schema that is used here: operators with their versions and options.

Codes, slots and defaults come from the package ``tflite``, which flatc generates from ``schema.fbs``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import tflite

FILE_IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3

TENSOR_TYPES: Mapping[np.dtype[np.generic], int] = {
    np.dtype(name): getattr(tflite.TensorType, name.upper())
    for name in ("float32", "float16", "int32", "uint8", "int64", "bool", "int16", "int8")
}


class Padding(IntEnum):
    """Padding mode of a convolution or pool."""

    SAME = tflite.Padding.SAME
    VALID = tflite.Padding.VALID


class Activation(IntEnum):
    """Activation fused into an operator."""

    NONE = tflite.ActivationFunctionType.NONE
    RELU = tflite.ActivationFunctionType.RELU
    RELU_N1_TO_1 = tflite.ActivationFunctionType.RELU_N1_TO_1
    RELU6 = tflite.ActivationFunctionType.RELU6


@dataclass(frozen=True, slots=True)
class OpSpec:
    """An operator: the versions of its float and int8 kernels, and its table of options.

    The versions are the lowest with these kernels; a 2.14 runtime has all of them.
    ``options`` is empty where the operator needs none.
    """

    version: int = 1
    integer_version: int = 2
    options: str = ""


OPS: Mapping[str, OpSpec] = {
    "ABS": OpSpec(),
    "ADD": OpSpec(options="AddOptions"),
    "ARG_MAX": OpSpec(options="ArgMaxOptions"),
    "ARG_MIN": OpSpec(options="ArgMinOptions"),
    "AVERAGE_POOL_2D": OpSpec(options="Pool2DOptions"),
    "BATCH_MATMUL": OpSpec(options="BatchMatMulOptions"),
    "BROADCAST_TO": OpSpec(version=2),
    "CAST": OpSpec(options="CastOptions"),
    "CEIL": OpSpec(integer_version=1),
    "CONCATENATION": OpSpec(options="ConcatenationOptions"),
    "CONV_2D": OpSpec(integer_version=3, options="Conv2DOptions"),
    "COS": OpSpec(integer_version=1),
    "DEPTHWISE_CONV_2D": OpSpec(integer_version=3, options="DepthwiseConv2DOptions"),
    "DEPTH_TO_SPACE": OpSpec(options="DepthToSpaceOptions"),
    "DEQUANTIZE": OpSpec(version=2),
    "DIV": OpSpec(integer_version=1, options="DivOptions"),
    "ELU": OpSpec(integer_version=1),
    "EQUAL": OpSpec(),
    "EXP": OpSpec(),
    "FLOOR": OpSpec(integer_version=1),
    "FULLY_CONNECTED": OpSpec(integer_version=4, options="FullyConnectedOptions"),
    "GATHER": OpSpec(options="GatherOptions"),
    "GREATER": OpSpec(),
    "HARD_SWISH": OpSpec(integer_version=1),
    "LEAKY_RELU": OpSpec(options="LeakyReluOptions"),
    "LESS": OpSpec(),
    "LOG": OpSpec(integer_version=1),
    "LOGISTIC": OpSpec(),
    "LOG_SOFTMAX": OpSpec(),
    "MAXIMUM": OpSpec(),
    "MAX_POOL_2D": OpSpec(options="Pool2DOptions"),
    "MEAN": OpSpec(options="ReducerOptions"),
    "MINIMUM": OpSpec(),
    "MIRROR_PAD": OpSpec(options="MirrorPadOptions"),
    "MUL": OpSpec(options="MulOptions"),
    "NEG": OpSpec(integer_version=1),
    "PAD": OpSpec(options="PadOptions"),
    "PADV2": OpSpec(options="PadV2Options"),
    "POW": OpSpec(integer_version=1),
    "PRELU": OpSpec(integer_version=1),
    "QUANTIZE": OpSpec(),
    "REDUCE_MAX": OpSpec(options="ReducerOptions"),
    "REDUCE_MIN": OpSpec(options="ReducerOptions"),
    "RELU": OpSpec(),
    "RELU6": OpSpec(),
    "RELU_N1_TO_1": OpSpec(integer_version=1),
    "RESHAPE": OpSpec(integer_version=1, options="ReshapeOptions"),
    "RESIZE_BILINEAR": OpSpec(version=3, integer_version=3, options="ResizeBilinearOptions"),
    "RESIZE_NEAREST_NEIGHBOR": OpSpec(version=3, integer_version=3, options="ResizeNearestNeighborOptions"),
    "ROUND": OpSpec(integer_version=1),
    "RSQRT": OpSpec(),
    "SELECT_V2": OpSpec(integer_version=1),
    "SIGN": OpSpec(integer_version=1),
    "SIN": OpSpec(integer_version=1),
    "SLICE": OpSpec(),
    "SOFTMAX": OpSpec(options="SoftmaxOptions"),
    "SPACE_TO_DEPTH": OpSpec(options="SpaceToDepthOptions"),
    "SPLIT": OpSpec(options="SplitOptions"),
    "SQRT": OpSpec(integer_version=1),
    "STRIDED_SLICE": OpSpec(options="StridedSliceOptions"),
    "SUB": OpSpec(options="SubOptions"),
    "SUM": OpSpec(options="ReducerOptions"),
    "TANH": OpSpec(),
    "TILE": OpSpec(),
    "TRANSPOSE": OpSpec(options="TransposeOptions"),
    "TRANSPOSE_CONV": OpSpec(version=3, integer_version=3, options="TransposeConvOptions"),
}
"""All operators that can be written, by name in the schema."""
