"""The node tests of the ONNX project whose types and operators torch supports."""

import functools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx.backend.test.loader import load_model_tests

from edgepack.ir.model import name_of, walk_nodes
from edgepack.training.graph import as_tensor, compile_model, run_program, unsupported

Array = npt.NDArray[Any]

TYPES = frozenset(["float32", "float64", "float16", "int8", "uint8", "int16", "int32", "int64", "bool"])
"""Types of values that torch supports; others (uint16, float8, strings, sequences) are not trained."""
AS_THE_RUNTIME = frozenset(
    {
        "test_resize_downsample_scales_linear_align_corners",
        "test_resize_downsample_scales_cubic_align_corners",
    }
)
"""The tests count fractions of output pixels, onnxruntime 1.32 whole ones, and so does edgepack."""


class Case(NamedTuple):
    """One model with inputs and expected outputs."""

    name: str
    model: ir.Model
    feeds: dict[str, Array]
    outputs: dict[str, Array]
    rtol: float
    atol: float


@functools.cache
def cases() -> dict[str, Case]:
    """All cases that can be run, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loader casts values that overflow, on purpose
        return {case.name: case for case in _cases()}


def _cases() -> Iterator[Case]:
    for test in load_model_tests(kind="node"):
        if not test.data_sets or test.model is None:
            continue
        inputs, outputs = test.data_sets[0]
        known = all(getattr(a, "dtype", None) is not None for a in (*inputs, *outputs) if a is not None)
        if test.name in AS_THE_RUNTIME or not known:
            continue
        if not TYPES.issuperset(str(np.asarray(a).dtype) for a in (*inputs, *outputs) if a is not None):
            continue
        model = ir.from_proto(test.model)
        if unsupported(model):
            continue
        feeds = {
            name_of(v): np.asarray(a)
            for v, a in zip(model.graph.inputs, inputs, strict=False)
            if a is not None
        }
        wanted = {name_of(v): np.asarray(a) for v, a in zip(model.graph.outputs, outputs, strict=True)}
        yield Case(test.name, model, feeds, wanted, test.rtol, test.atol)


def operators(case: Case) -> set[str]:
    """The operator types in a case."""
    return {node.op_type for node in walk_nodes(case.model.graph)}


def run(case: Case) -> dict[str, Array]:
    """The outputs of a case on torch."""
    feeds = {name: as_tensor(array) for name, array in case.feeds.items()}
    with torch.no_grad():
        made = run_program(compile_model(case.model), feeds)
    return {name: tensor.numpy() for name, tensor in made.items()}
