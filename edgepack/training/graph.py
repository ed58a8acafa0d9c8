"""Compiles an ONNX graph to a differentiable program on torch tensors."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgepack.errors import ModelError
from edgepack.graph.opset import opset_of
from edgepack.ir.arrays import Array
from edgepack.ir.model import constant, name_of, walk_nodes
from edgepack.training.operators.shapes import TYPES
from edgepack.training.operators.table import CONTROL, OPERATORS
from edgepack.training.step import Body, Step
from edgepack.training.weights import array_of, keys_of

STANDARD = ("", "ai.onnx")
FOLD_ELEMENTS = 1 << 24
"""Constant folding keeps results up to this size; larger ones are computed in every run."""


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A compiled graph; immutable."""

    body: Body
    types: Mapping[str, torch.dtype]
    """Types of the graph outputs, where the file declares them."""
    dying: tuple[tuple[str, ...], ...]
    """Values that no later step consumes."""


def unsupported(model: ir.Model) -> tuple[str, ...]:
    """Reasons why ``model`` cannot run on torch, one line for each kind of node."""
    found: dict[str, str] = {}
    imports = model.graph.opset_imports
    opset = imports.get("", imports.get("ai.onnx", 0))
    for node in walk_nodes(model.graph):
        reason = _refusal(node, opset)
        if reason is not None:
            found.setdefault(reason, f"{reason} (first: node {node.name or node.outputs[0].name!r})")
    return tuple(found.values())


def _refusal(node: ir.Node, opset: int) -> str | None:
    if node.domain not in STANDARD:
        return f"{node.op_type} of domain {node.domain}"
    op = node.op_type
    if op != "Constant" and op not in OPERATORS and op not in CONTROL:
        return op
    if op == "BatchNormalization" and node.attributes.get_int("training_mode", False):
        return "BatchNormalization in training mode"
    if op == "Dropout" and len(node.inputs) > 2:
        training = constant(node.inputs[2])
        if node.inputs[2] is not None and (training is None or bool(training)):
            return "Dropout in training mode"
    if op == "Scan" and opset < 9:
        return "Scan of opset 8"
    wanted = node.attributes.get_int("to", 1) if op == "Cast" else 1
    if wanted not in TYPES:
        return f"Cast to {ir.DataType(wanted).name}"
    return None


def compile_model(model: ir.Model, changing: Collection[str] = ()) -> Program:
    """Compile ``model``; constants with keys in ``changing`` become inputs of every run.

    Raises:
        ModelError: lists every node that cannot run.
    """
    refused = unsupported(model)
    if refused:
        raise ModelError(
            "the model cannot be trained; these have no torch implementation: " + "; ".join(refused)
        )
    keys = keys_of(model)
    body = _body(model.graph, opset_of(model), keys)
    body = _folded(body, frozenset(changing))
    types = {
        name_of(v): TYPES[int(v.dtype)]
        for v in model.graph.outputs
        if v.dtype is not None and int(v.dtype) in TYPES
    }
    return Program(body, types, _dying(body))


def as_tensor(array: Array) -> Tensor:
    """A torch tensor with a copy of ``array``."""
    return torch.from_numpy(np.array(array, order="C"))


def _body(graph: ir.Graph, opset: int, keys: Mapping[ir.Value, str]) -> Body:
    sources = list(graph.initializers.values())
    sources += [n.outputs[0] for n in graph if n.op_type == "Constant" and n.domain in STANDARD]
    constants = {name_of(v): as_tensor(array_of(v)) for v in sources}
    steps = tuple(_step(n, opset, keys) for n in graph if n.op_type != "Constant")
    return Body(
        inputs=tuple(name_of(v) for v in graph.inputs if not v.is_initializer()),
        outputs=tuple(name_of(v) for v in graph.outputs),
        constants=constants,
        steps=steps,
        keys={name_of(v): keys[v] for v in sources},
    )


def _step(node: ir.Node, opset: int, keys: Mapping[ir.Value, str]) -> Step:
    attributes: dict[str, Any] = {}
    bodies: dict[str, Body] = {}
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            bodies[name] = _body(attribute.as_graph(), opset, keys)
        elif attribute.type == ir.AttributeType.TENSOR:
            attributes[name] = as_tensor(attribute.as_tensor().numpy())
        else:
            attributes[name] = attribute.value
    return Step(
        op_type=node.op_type,
        name=node.name or "",
        inputs=tuple("" if v is None else name_of(v) for v in node.inputs),
        outputs=tuple(v.name or "" for v in node.outputs),
        opset=opset,
        attributes=attributes,
        bodies=bodies,
    )


def _reads(step: Step) -> set[str]:
    """All values that a step consumes, including those captured by its subgraphs."""
    names = {name for name in step.inputs if name}
    for body in step.bodies.values():
        inner = set(body.outputs).union(*(_reads(s) for s in body.steps))
        made = {name for s in body.steps for name in s.outputs}
        names |= inner - made - set(body.inputs) - set(body.constants)
    return names


def _folded(body: Body, changing: frozenset[str]) -> Body:
    """The body after constant folding of everything that does not depend on changing constants."""
    fixed = {name: t for name, t in body.constants.items() if body.keys[name] not in changing}
    steps = []
    for step in body.steps:
        foldable = not step.bodies and all(name in fixed for name in _reads(step))
        if not foldable:
            steps.append(step)
            continue
        with torch.no_grad():
            made = _results(step, _call(step, fixed, {}))
        if sum(t.numel() for t in made.values()) > FOLD_ELEMENTS:
            steps.append(step)
        else:
            fixed.update(made)
    keys = {name: body.keys.get(name, "") for name in (*fixed, *body.constants)}
    return Body(body.inputs, body.outputs, {**body.constants, **fixed}, tuple(steps), keys)


def _dying(body: Body) -> tuple[tuple[str, ...], ...]:
    last = {name: place for place, step in enumerate(body.steps) for name in _reads(step)}
    dying: list[list[str]] = [[] for _ in body.steps]
    for name, place in last.items():
        if name not in body.constants and name not in body.outputs:
            dying[place].append(name)
    return tuple(map(tuple, dying))


def run_program(
    program: Program,
    feeds: Mapping[str, Tensor],
    values: Mapping[str, Tensor] | None = None,
    keep: Collection[str] = (),
) -> dict[str, Tensor]:
    """Run the graph; return its outputs and the values named in ``keep``, by name.

    ``values`` replace the constants with the same keys. Quantized values are float inside the program;
    outputs that the file declares as integers are cast at the end.
    """
    body = program.body
    env = _constants(body, values or {})
    env.update(feeds)
    for step, dying in zip(body.steps, program.dying, strict=True):
        env.update(_results(step, _call(step, env, values or {})))
        for name in dying:
            if name not in keep:
                del env[name]
    found = {name: env[name] for name in keep}
    for name in body.outputs:
        kind = program.types.get(name, env[name].dtype)
        integer = env[name].is_floating_point() and not kind.is_floating_point
        found[name] = env[name].to(kind) if integer else env[name]
    return found


def _constants(body: Body, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.get(body.keys[name], tensor) for name, tensor in body.constants.items()}


def _call(step: Step, env: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Any:
    inputs = [env[name] if name else None for name in step.inputs]
    try:
        if step.op_type in CONTROL:
            return _CONTROL[step.op_type](step, inputs, env, values)
        return OPERATORS[step.op_type](step, *inputs)
    except (RuntimeError, IndexError, ValueError, TypeError, KeyError) as error:
        shapes = ", ".join("-" if x is None else str(list(x.shape)) for x in inputs)
        raise ModelError(
            f"node {step.name!r} ({step.op_type} of {shapes}) fails on torch: {error}"
        ) from error


def _results(step: Step, made: Any) -> dict[str, Tensor]:
    several = made if isinstance(made, tuple | list) else (made,)
    return {name: tensor for name, tensor in zip(step.outputs, several, strict=False) if name}


def _run_body(
    body: Body, inputs: list[Tensor], env: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> list[Tensor]:
    inner = {**env, **_constants(body, values), **dict(zip(body.inputs, inputs, strict=True))}
    for step in body.steps:
        inner.update(_results(step, _call(step, inner, values)))
    return [inner[name] for name in body.outputs]


def _if(
    step: Step, inputs: list[Any], env: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> list[Tensor]:
    branch = step.bodies["then_branch" if bool(inputs[0]) else "else_branch"]
    return _run_body(branch, [], env, values)


def _loop(
    step: Step, inputs: list[Any], env: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> list[Tensor]:
    trips, going, *carried = [*inputs, None, None][: max(len(inputs), 2)]
    body = step.bodies["body"]
    most = None if trips is None else int(trips)
    live, count = going is None or bool(going), 0
    stacked: list[list[Tensor]] = [[] for _ in body.outputs[1 + len(carried) :]]
    while live and (most is None or count < most):
        made = _run_body(body, [torch.tensor(count), torch.tensor(live), *carried], env, values)
        live, count = bool(made[0]), count + 1
        carried = made[1 : 1 + len(carried)]
        for row, tensor in zip(stacked, made[1 + len(carried) :], strict=True):
            row.append(tensor)
    return [*carried, *(torch.stack(row) if row else torch.empty(0) for row in stacked)]


def _scan(
    step: Step, inputs: list[Any], env: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> list[Tensor]:
    body, scanned = step.bodies["body"], step.get("num_scan_inputs")
    state, sequences = inputs[: len(inputs) - scanned], inputs[len(inputs) - scanned :]
    axes = step.get("scan_input_axes", [0] * scanned)
    turned = step.get("scan_input_directions", [0] * scanned)
    rows = [s.movedim(a, 0) for s, a in zip(sequences, axes, strict=True)]
    rows = [r.flip(0) if t else r for r, t in zip(rows, turned, strict=True)]
    stacked: list[list[Tensor]] = [[] for _ in body.outputs[len(state) :]]
    for now in zip(*rows, strict=True):
        made = _run_body(body, [*state, *now], env, values)
        state = made[: len(state)]
        for row, tensor in zip(stacked, made[len(state) :], strict=True):
            row.append(tensor)
    out_axes = step.get("scan_output_axes", [0] * len(stacked))
    out_turned = step.get("scan_output_directions", [0] * len(stacked))
    ends = [torch.stack(row[::-1] if t else row) for row, t in zip(stacked, out_turned, strict=True)]
    return [*state, *(e.movedim(0, a) for e, a in zip(ends, out_axes, strict=True))]


_CONTROL = {"If": _if, "Loop": _loop, "Scan": _scan}
