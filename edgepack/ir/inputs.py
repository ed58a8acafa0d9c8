"""Arrays that are fed to a model, and the specification of its inputs."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepack.errors import ModelError
from edgepack.ir.model import name_of

_PICTURE_RANK = 4


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of the model."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None
    """Fixed sizes, names of symbolic dimensions, None for an unknown one; None for an unknown rank."""


def has_batch_axis(spec: InputSpec) -> bool:
    """Whether the first axis is certainly the batch: dynamic, and named so or the first axis of an image.

    A dynamic axis of another name may be time or points, whose entries belong together.
    """
    if not spec.shape or isinstance(spec.shape[0], int):
        return False
    name = (spec.shape[0] or "").lower()
    picture = len(spec.shape) >= _PICTURE_RANK and not re.search("time|frame|seq|step|^t$", name)
    return picture or "batch" in name or name in ("b", "bs")


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """The inputs that a caller must feed: graph inputs that are not initializers.

    Raises:
        ModelError: an input is not a tensor.
    """
    specs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if not isinstance(value.type, ir.TensorType):
            raise ModelError(f"input {value.name!r} is {value.type}, only tensors are supported")
        shape = None
        if value.shape is not None:
            shape = tuple(_dimension(d) for d in value.shape)
        specs.append(InputSpec(name_of(value), np.dtype(value.type.dtype.numpy()), shape))
    return tuple(specs)


def _dimension(size: int | ir.SymbolicDim) -> int | str | None:
    """A fixed size, the name of a dynamic one, or ``None``; some exporters write -1 for a dynamic size."""
    if isinstance(size, int):
        return size if size >= 0 else None
    return size.value
