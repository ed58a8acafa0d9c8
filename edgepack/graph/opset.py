"""The opset of a model, and how to raise it."""

import onnx_ir as ir

from edgepack.errors import ModelError
from edgepack.graph.notes import Log, Refusal
from edgepack.graph.rules.fusions import hard_swish_input
from edgepack.graph.rules.gelu import OPSET as GELU_OPSET
from edgepack.graph.rules.gelu import gelu_input
from edgepack.graph.rules.rule import is_op
from edgepack.ir.files import weight_bytes
from edgepack.ir.model import LARGE_BYTES, clone, constant, walk_nodes

HARD_SWISH_OPSET = 14
_LAST_OLD_RESIZE = 10


def opset_of(model: ir.Model) -> int:
    """The version of the standard operators that the model imports.

    Raises:
        ModelError: it imports none.
    """
    imports = model.graph.opset_imports
    version = imports.get("", imports.get("ai.onnx"))
    if version is None:
        raise ModelError(f"the model does not import the standard ONNX operators, only {dict(imports)}")
    return version


def wanted_opset(model: ir.Model, now: int, min_opset: int, max_opset: int) -> int:
    """The least allowed opset, or the first with HardSwish if the model contains a decomposed one."""
    wanted = max(now, min_opset)
    if wanted < HARD_SWISH_OPSET <= max_opset and any(
        is_op(node, "Mul", "Div") and hard_swish_input(node) is not None for node in walk_nodes(model.graph)
    ):
        return HARD_SWISH_OPSET
    return wanted


def raise_opset(model: ir.Model, log: Log, wanted: int) -> None:
    """Convert all standard operators to ``wanted``.

    Raises:
        ModelError: no converter for an operator.
    """
    from onnxscript import version_converter  # noqa: PLC0415  # takes seconds to import

    now = opset_of(model)
    if now >= wanted:
        return
    version_converter.convert_version(model, target_version=wanted, fallback=True)
    if opset_of(model) != wanted:
        raise ModelError(
            f"the model cannot be raised from opset {now} to {wanted}: the ONNX version converter gave up; "
            f"export it with opset {wanted}"
        )
    if now <= _LAST_OLD_RESIZE:
        _old_resizes(model)
    log.applied["raise_opset"] += wanted - now


def raised_for_gelu(model: ir.Model, log: Log, max_opset: int) -> ir.Model:
    """The model in the first opset with Gelu, if it contains a decomposed GELU and can be converted."""
    if not opset_of(model) < GELU_OPSET <= max_opset or weight_bytes(model) > LARGE_BYTES:
        return model
    if not any(gelu_input(node) is not None for node in walk_nodes(model.graph)):
        return model
    raised = clone(model)
    try:
        raise_opset(raised, log, GELU_OPSET)
    except ModelError as refusal:
        log.refused["gelu_tanh", ""] = Refusal("gelu_tanh", "", str(refusal))
        return model
    return raised


def _old_resizes(model: ir.Model) -> None:
    """State the semantics of Resize and Upsample before opset 11: the converter applies newer defaults."""
    for node in walk_nodes(model.graph):
        if not is_op(node, "Resize"):
            continue
        scales = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        smaller = scales is not None and bool((scales < 1).any())
        node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
        node.attributes.add(ir.AttrString("nearest_mode", "ceil" if smaller else "floor"))
