"""Convolutions, matrix products, Einsum and Det."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgepack.training.operators.window import crop_pad, paddings
from edgepack.training.step import Operator, Step

CONV: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
CONV_TRANSPOSE: dict[int, Any] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def conv(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Conv; asymmetric padding is applied first."""
    rank = weight.dim() - 2
    strides = list(step.get("strides", [1] * rank))
    dilations = list(step.get("dilations", [1] * rank))
    begin, end = paddings(step, x.shape[2:], weight.shape[2:], strides, dilations)
    if begin != end:
        x, begin = crop_pad(x, begin, end), [0] * rank
    result: Tensor = CONV[rank](x, weight, bias, strides, begin, dilations, step.get("group", 1))
    return result


def conv_transpose(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """ConvTranspose without padding, then cropped or padded to ``pads`` or ``output_shape``."""
    rank = weight.dim() - 2
    strides = list(step.get("strides", [1] * rank))
    dilations = list(step.get("dilations", [1] * rank))
    extra = list(step.get("output_padding", [0] * rank))
    whole = CONV_TRANSPOSE[rank](x, weight, None, strides, 0, 0, step.get("group", 1), dilations)
    auto = step.get("auto_pad", "NOTSET")
    wanted = step.get("output_shape")
    if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if wanted is not None:
        total = [w + e - s for w, e, s in zip(whole.shape[2:], extra, wanted[-rank:], strict=True)]
        half = [t // 2 for t in total]
        rest = [t - h for t, h in zip(total, half, strict=True)]
        begin, end = (half, rest) if auto == "SAME_UPPER" else (rest, half)
    else:
        pads = step.get("pads", [0] * (2 * rank))
        begin, end = list(pads[:rank]), list(pads[rank:])
    cropped = crop_pad(whole, [-b for b in begin], [e - p for e, p in zip(extra, end, strict=True)])
    return cropped if bias is None else cropped + bias.reshape(-1, *[1] * rank)


def gemm(step: Step, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Gemm: ``alpha A B + beta C``."""
    a = a.t() if step.get("transA", 0) else a
    b = b.t() if step.get("transB", 0) else b
    alpha, beta = step.get("alpha", 1.0), step.get("beta", 1.0)
    product = torch.matmul(a, b)
    if alpha != 1:
        product = product * alpha
    if c is None:
        return product
    return product + (c if beta == 1 else c * beta)


def matmul(step: Step, a: Tensor, b: Tensor) -> Tensor:
    """MatMul, as ``numpy.matmul``."""
    return torch.matmul(a, b)


def einsum(step: Step, *operands: Tensor) -> Tensor:
    """Einsum."""
    return torch.einsum(step.get("equation").replace(" ", ""), *operands)


def det(step: Step, x: Tensor) -> Tensor:
    """Determinants of the last two axes."""
    return torch.linalg.det(x)


OPERATORS: dict[str, Operator] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Det": det,
    "Einsum": einsum,
    "Gemm": gemm,
    "MatMul": matmul,
}
