"""Normalization: rewrite a graph of any exporter into one canonical form with the same outputs.

The only module that imports onnxscript (inside functions: the import takes seconds). The steps in order:

1.  ``inline``: functions become nodes, so that later steps need not look into calls.
2.  ``constants``: Constant nodes, and initializers among the graph inputs, become plain initializers. Paddle
    exports have every weight in a Constant node, and later steps test for constants.
    Half precision becomes float32 here, see :mod:`edgepack.graph.half_precision`.
3.  ``clean``: remove nodes that do nothing, so that they do not interrupt the patterns below.
4.  ``shapes``: shape inference; folding of shape arithmetic and most rules need shapes.
5.  ``fold``: constant subgraphs become constants (padding computed from static shapes, transposed weights).
6.  ``opset``: raise it as little as the target, a recognized HardSwish (14) or GELU (20) needs. After
    folding, because the converters of old operators require constant parameters.
7.  ``constants``, ``shapes``, ``fold`` again: the converters write Constant nodes.
8.  ``activations``: recognize HardSwish and HardSigmoid before their constants are folded away, and rewrite
    Einsum to MatMul, before shapes are inferred once more.
9.  ``affine`` with ``padding``: fold multiplications, additions, batch normalization and zero padding into
    the weights and attributes of adjacent nodes, until nothing changes. With them ``selection``: a value
    consumed at one position only is computed for that position only. Before ``padding`` a Pad of some axes
    becomes one of all axes; ``alpha`` and ``beta`` of a Gemm are folded into its constants.
10. ``gemm``: MatMul and Add become Gemm; after folding, which treats MatMul and bias as one group.
11. ``merge``: equal constants and equal nodes become one; last, because sharing hides patterns.
12. ``check``: remove dead code, make names unique, run the ONNX checker.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from edgepack.errors import ModelError
from edgepack.graph.half_precision import HalfPrecisionNotes, has_half_precision, to_float32
from edgepack.graph.notes import Log, NormalizeNotes, Refusal
from edgepack.graph.opset import HARD_SWISH_OPSET, opset_of, raise_opset, raised_for_gelu, wanted_opset
from edgepack.graph.rules.affine import FOLDING, GEMM
from edgepack.graph.rules.cleanup import AFTER_FOLDING, BEFORE_FOLDING, CLEANING
from edgepack.graph.rules.einsum import EINSUM
from edgepack.graph.rules.fusions import ACTIVATIONS, PADDING
from edgepack.graph.rules.gelu import GELU
from edgepack.graph.rules.gelu import OPSET as GELU_OPSET
from edgepack.graph.rules.gemm import FACTORS
from edgepack.graph.rules.indexing import INDEXING
from edgepack.graph.rules.pad import ALL_AXES
from edgepack.graph.rules.resize import RESIZING
from edgepack.graph.rules.rule import DONE, Rule, is_op
from edgepack.graph.rules.selection import SELECTION
from edgepack.graph.rules.sequence import as_the_opset_has_it
from edgepack.graph.rules.softmax import ROWS, TURNED
from edgepack.graph.shape_inference import forget_made_up_names, infer_shapes
from edgepack.ir.fingerprint import tensor_digest
from edgepack.ir.model import clone, constant, constant_tensor, name_of, walk_nodes

_FOLD_INPUT_ELEMENTS = 1 << 24
_FOLD_OUTPUT_ELEMENTS = 1 << 18
_SMALL_ELEMENTS = 1024
_SMALL_BYTES = 1024
"""onnx_ir passes constants of up to 1,000 bytes to the checker, and omits larger ones."""
_FOLD_BUDGET_BYTES = 256 << 20
"""Total bytes that constant folding may produce: a model of gigabytes must not be copied into memory."""
_MAX_SWEEPS = 32
_MIN_IR_VERSION = 4
"""The first IR version in which an initializer need not be a graph input."""
_UNFOLDABLE = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def normalize(model: ir.Model, *, min_opset: int, max_opset: int) -> tuple[ir.Model, NormalizeNotes]:
    """A new model in canonical form that computes the same; ``model`` is not changed.

    Graph inputs and outputs keep names, types and order; initializers among the inputs become constants.

    Args:
        model: any ONNX model in float; half precision becomes float32.
        min_opset: raise the standard opset to at least this.
        max_opset: never raise it above this.

    Raises:
        ModelError: the opset is above ``max_opset`` or cannot be raised, or the ONNX checker refuses the
            result (it then refuses the original too); or half precision cannot become float32.
    """
    model, source = clone(model), model
    before = opset_of(source)
    if before > max_opset:
        raise ModelError(
            f"the model needs opset {before} and the target's runtime loads up to {max_opset}: "
            f"export it with opset {max_opset} or lower"
        )
    log = Log()
    _read_small_constants(model)
    with _quiet_onnxscript():
        _run(model, log, "inline", passes.InlinePass())
        _constants(model, log)
        half_precision = _to_float32(model, log)
        _apply(model, log, CLEANING)
        _shapes_and_fold(model, log)
        raise_opset(model, log, wanted_opset(model, before, min_opset, max_opset))
        model = raised_for_gelu(model, log, max_opset)
        _constants(model, log)
        _apply(model, log, CLEANING)
        _shapes_and_fold(model, log)
        _apply(model, log, ACTIVATIONS if opset_of(model) >= HARD_SWISH_OPSET else ACTIVATIONS[1:])
        gelu = GELU if opset_of(model) >= GELU_OPSET else ()
        _apply(model, log, (*CLEANING, *ALL_AXES, *PADDING, *EINSUM, *gelu))
        _shapes_and_fold(model, log)  # shapes that a Pad or auto_pad hid are known now
        log.refused.clear()  # a pattern that an early sweep refused may match in a later one
        folding = (*CLEANING, *ALL_AXES, *PADDING, *FACTORS, *FOLDING)
        _apply(model, log, (*folding, *INDEXING, *SELECTION, *TURNED, *RESIZING))
        _apply(model, log, (*GEMM, *ROWS))
        _merge(model, log)
    _finish(model)
    return model, NormalizeNotes(
        applied={name: n for name, n in sorted(log.applied.items()) if n},
        refused=(
            *log.refused.values(),
            *(Refusal("to_float32", k.node, k.reason) for k in half_precision.kept),
        ),
        unsupported=_foreign_operators(model),
        half_precision=half_precision,
        opset_before=before,
        opset_after=opset_of(model),
        nodes_before=sum(1 for _ in walk_nodes(source.graph)),
        nodes_after=sum(1 for _ in walk_nodes(model.graph)),
    )


@contextmanager
def _quiet_onnxscript() -> Iterator[None]:
    """Silence onnxscript, which warns about every node that it skips; errors that matter are raised here."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read_small_constants(model: ir.Model) -> None:
    """Load the constants that the ONNX checker gets: it looks for external files in the working folder."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= _SMALL_BYTES:
                value.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name)


def _run(model: ir.Model, log: Log, name: str, step: ir.passes.InPlacePass) -> None:
    if step(model).modified:
        log.applied[name] += 1


def _constants(model: ir.Model, log: Log) -> None:
    log.applied["lift_constant"] += sum(is_op(node, "Constant") for node in walk_nodes(model.graph))
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    log.applied["lift_constant"] -= sum(is_op(node, "Constant") for node in walk_nodes(model.graph))
    _run(model, log, "initializers_from_inputs", passes.RemoveInitializersFromInputsPass())
    # Subgraphs see the outer graph, so one initializer in the main graph serves all of them.
    passes.LiftSubgraphInitializersToMainGraphPass()(model)


def _to_float32(model: ir.Model, log: Log) -> HalfPrecisionNotes:
    """Convert half precision to float32; first infer shapes, which infers the types that this needs."""
    if not has_half_precision(model):
        return HalfPrecisionNotes()
    infer_shapes(model)
    half_precision = to_float32(model)
    log.applied["to_float32"] = half_precision.values
    return half_precision


def _apply(model: ir.Model, log: Log, rules: tuple[Rule, ...]) -> None:
    """Run rules over all nodes until none applies any more."""
    by_op: dict[str, list[Rule]] = {}
    for rule in rules:
        for op in rule.ops:
            by_op.setdefault(op, []).append(rule)
    for _ in range(_MAX_SWEEPS):
        changed = 0
        for graph in list(model.graphs()):
            for node in list(graph):
                changed += _apply_to(model.graph, node, by_op.get(node.op_type, []), log)
        passes.RemoveUnusedNodesPass()(model)
        if not changed:
            return
    raise AssertionError(f"rules {[rule.name for rule in rules]} did not come to rest")


def _apply_to(main: ir.Graph, node: ir.Node, rules: list[Rule], log: Log) -> int:
    """Apply rules to one node, until it is removed or no rule is left."""
    done = 0
    if not rules or not is_op(node, node.op_type):
        return done
    for rule in rules:
        if node.graph is None:
            break
        outcome = rule.apply(main, node)
        if outcome is None:
            continue
        place = node.outputs[0].name or ""
        if outcome == DONE:
            log.applied[rule.name] += 1
            log.refused.pop((rule.name, place), None)
            done += 1
        else:
            log.refused[rule.name, place] = Refusal(rule.name, place, outcome)
    return done


def _shapes_and_fold(model: ir.Model, log: Log) -> None:
    from onnxscript.optimizer import fold_constants_ir  # noqa: PLC0415  # takes seconds to import

    infer_shapes(model)
    before = sum(1 for _ in walk_nodes(model.graph))
    _apply(model, Log(), BEFORE_FOLDING)
    fold_constants_ir(
        model,
        onnx_shape_inference=True,
        input_size_limit=_FOLD_INPUT_ELEMENTS,
        output_size_limit=_FOLD_OUTPUT_ELEMENTS,
        should_fold=_budget(_FOLD_BUDGET_BYTES),
    )
    passes.RemoveUnusedNodesPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    as_the_opset_has_it(model, opset_of(model))
    _apply(model, Log(), AFTER_FOLDING)
    log.applied["fold_constant"] += before - sum(1 for _ in walk_nodes(model.graph))


def _budget(left_bytes: int) -> Callable[[ir.Node], bool | None]:
    """A predicate for constant folding, which refuses nodes once the budget of large results is used up."""

    def should_fold(node: ir.Node) -> bool | None:
        nonlocal left_bytes
        if node.op_type in _UNFOLDABLE or node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type == "ConstantOfShape":  # onnxscript keeps these; padding amounts may come from one
            shape = constant(node.inputs[0])
            return shape is not None and int(np.prod(shape)) <= _SMALL_ELEMENTS
        tensors = [t for v in node.inputs if (t := constant_tensor(v)) is not None]
        cost = sum(t.nbytes for t in tensors)
        if cost > left_bytes:
            return False
        left_bytes -= cost
        return None

    return should_fold


def _merge(model: ir.Model, log: Log) -> None:
    for graph in model.graphs():
        log.applied["merge_initializer"] += merge_initializers(graph)
    before = sum(1 for _ in walk_nodes(model.graph))
    passes.CommonSubexpressionEliminationPass()(model)
    log.applied["merge_node"] += before - sum(1 for _ in walk_nodes(model.graph))


def merge_initializers(graph: ir.Graph) -> int:
    """Replace equal constants by one; returns how many were removed. Reads only candidates for equality."""
    groups: dict[tuple[object, ...], list[ir.Value]] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not value.is_graph_input() and not value.is_graph_output():
            groups.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
    gone = 0
    for values in groups.values():
        kept: dict[bytes, ir.Value] = {}
        for value in values if len(values) > 1 else []:
            assert value.const_value is not None
            keep = kept.setdefault(tensor_digest(value.const_value), value)
            if keep is not value:
                value.replace_all_uses_with(keep)
                del graph.initializers[name_of(value)]
                gone += 1
    return gone


def _finish(model: ir.Model) -> None:
    for step in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
        passes.TopologicalSortPass(),
        passes.NameFixPass(),
    ):
        step(model)
    needed = onnx.helper.find_min_ir_version_for(
        [onnx.helper.make_opsetid(domain, version) for domain, version in model.graph.opset_imports.items()],
        ignore_unknown=True,
    )
    model.ir_version = max(model.ir_version, needed, _MIN_IR_VERSION)
    infer_shapes(model)
    # Measured: with these names onnxruntime 1.32 can fuse SkipLayerNormalization in a small BERT, and that
    # kernel is slower on the CPU (8 % and more of the whole model) than the nodes it replaces.
    forget_made_up_names(model)
    for graph in model.graphs():
        for value in (*graph.initializers.values(), *(v for node in graph for v in node.outputs)):
            value.metadata_props.pop("pkg.onnxscript.optimizer.folded_from", None)
            value.meta.clear()
    try:
        passes.CheckerPass()(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"the ONNX checker refuses the normalized model: {error}") from error


def _foreign_operators(model: ir.Model) -> tuple[str, ...]:
    names = {f"{n.domain}::{n.op_type}" for n in walk_nodes(model.graph) if n.domain not in ("", "ai.onnx")}
    return tuple(sorted(names))
