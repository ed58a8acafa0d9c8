"""Profile: the time of each node of the graph that the runtime executes.

Nodes are matched to those of the original model by name. Names in onnxruntime 1.32:

- a fused int8 operator keeps the name of its float node (``QLinearAdd`` for ``Add``, ``QGemm`` for ``Gemm``,
  ``QLinearMatMul`` for ``MatMul``); the QuantizeLinear and DequantizeLinear around it are removed;
- a convolution or pooling in channels-last layout has a suffix such as ``_token_7``, with any number;
- a float convolution in the NCHWc layout is named after its output, after the activation:
  ``relu_out_nchwc`` for ``conv -> relu -> relu_out``;
- float fusions are named ``fused gemm``, ``mul/LayerNormFusion/``, ``matmul/MatMulScaleFusion/``, or by type
  (``Gelu``, ``BiasGelu_token_5``); all keep the name of the output value;
- operators without a kernel are expanded to nodes without a name (``HardSwish`` to ``HardSigmoid`` and
  ``Mul``); the profile names these by operator and index, ``HardSigmoid_447``;
- layout changes (``Transpose``, ``Transpose_token_27``, ``ReorderInput``, ``ReorderOutput``) are new nodes,
  and a DequantizeLinear with several consumers is duplicated, ``x_DequantizeLinear/duplicated``.

Profiling costs about 2 µs per node, and durations are whole microseconds. The cost per node is computed from
runs without profiling and subtracted, so that times do not add up to more than a run. Times below one
microsecond are only estimates.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.benchmark.bench import measure
from edgepack.config.target import Runtime
from edgepack.errors import ModelError
from edgepack.ir.arrays import Feeds
from edgepack.runtime.runner import open_model
from edgepack.runtime.session import open_optimized

Doubles = npt.NDArray[np.float64]

CONVERSIONS = frozenset(
    [
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "Transpose",
        "ReorderInput",
        "ReorderOutput",
    ]
)
"""Operators that the runtime inserts; matched only where the model has such a node itself."""
MOST_PROFILING_US = 5.0
"""Most cost of profiling per node; a larger difference has another cause."""
LONGEST_CHAIN = 4
"""Most nodes that one operator is expanded to, and most groups that are fused into one."""

HEAVY_OPS = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])
"""Operators that the runtime fuses other groups into; the fused node is named after the last output."""


class FusionGroup(Protocol):
    """A fusion group that a profile is matched with: a main node and the activation that follows."""

    @property
    def name(self) -> str:
        """The main node's name."""

    @property
    def op_type(self) -> str:
        """The main node's operator type."""

    @property
    def activation(self) -> str | None:
        """The name of the activation node."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Input values without initializers."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Output values."""


Groups = Mapping[str, FusionGroup]


@dataclass(frozen=True, slots=True)
class NodeTime:
    """One executed node."""

    name: str
    op_type: str
    us: float
    """Median microseconds per run."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OpProfile:
    """Times of one model's nodes, in the order of execution."""

    nodes: tuple[NodeTime, ...]
    run_us: float
    """Microseconds of a run without profiling."""
    profiling_us: float
    """Cost of profiling per node, which is subtracted already."""

    @property
    def by_op_type(self) -> dict[str, float]:
        """Microseconds by operator type, the most expensive first."""
        totals: dict[str, float] = defaultdict(float)
        for node in self.nodes:
            totals[node.op_type] += node.us
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, Any]:
        """For a JSON report."""
        return {**asdict(self), "by_op_type": self.by_op_type}


@dataclass(frozen=True, slots=True)
class GroupTimes:
    """A profile by groups of the float model."""

    us: dict[str, float]
    """Microseconds by group name, without groups that the runtime fused into another."""
    overhead: tuple[NodeTime, ...]
    """Nodes that belong to no group: conversions, layout changes."""

    @property
    def overhead_us(self) -> float:
        """Microseconds of the overhead."""
        return sum(node.us for node in self.overhead)


def profile_ops(model: Path, runtime: Runtime, feeds: Sequence[Feeds], *, runs: int = 20) -> OpProfile:
    """Time each node of ``model`` over ``runs`` runs on ``feeds`` in turn, after one warm-up run.

    Nodes in the body of a Loop or If count as part of it.

    Raises:
        ModelError: the runtime refuses the model, or its profile does not fit its optimized graph.
    """
    plain = float(np.median(measure([open_model(model, runtime)], feeds, runs).best)) * 1e6
    with tempfile.TemporaryDirectory(prefix="edgepack-profile-") as folder:
        session, optimized = open_optimized(
            model, runtime, Path(folder), profile_prefix=Path(folder) / "profile"
        )
        for index in range(runs + 1):
            session.run(None, dict(feeds[max(index - 1, 0) % len(feeds)]))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        nodes = list(optimized.graph)
    medians = np.median([_aligned(nodes, run, model) for run in _runs(events)][1:], axis=0)
    node_us, extra = without_profiling(medians, plain)
    timed = [
        NodeTime(
            name=node.name or f"{node.op_type} without a name",
            op_type=node.op_type,
            us=float(us),
            inputs=tuple(v.name or "" for v in node.inputs if v is not None),
            outputs=tuple(v.name or "" for v in node.outputs),
        )
        for node, us in zip(nodes, node_us, strict=True)
    ]
    return OpProfile(tuple(timed), plain, extra)


def without_profiling(profiled_us: Doubles, run_us: float) -> tuple[Doubles, float]:
    """Times ``profiled_us`` [nodes] without the cost of profiling, and that cost per node.

    The excess of the sum over ``run_us``, a run without profiling, is subtracted evenly, since writing an
    event costs the same for each node, but at most ``MOST_PROFILING_US`` per node. A remaining excess comes
    from other programs (nodes are timed by the wall clock) and grows with the time of a node; times are
    scaled down by it.
    """
    over = max(float(profiled_us.sum()) - run_us, 0.0)
    extra = min(over / max(len(profiled_us), 1), MOST_PROFILING_US)
    left = np.maximum(profiled_us - extra, 0.0)
    return left * min(run_us / max(float(left.sum()), run_us, 1e-9), 1.0), extra


def _runs(events: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The node events of each run; the event of a run follows those of its nodes."""
    found: list[dict[str, Any]] = []
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            found.append(event)
        elif event["name"] == "model_run":
            yield found
            found = []


def _aligned(nodes: Sequence[ir.Node], events: Sequence[dict[str, Any]], model: Path) -> list[float]:
    """Microseconds of ``nodes`` in a run with ``events``; events of subgraphs are skipped."""
    remaining = iter(events)
    times = []
    for node in nodes:
        for event in remaining:
            name = event["name"].removesuffix("_kernel_time")
            same = name == node.name if node.name else name.startswith(f"{node.op_type}_")
            if same and event["args"]["op_name"] == node.op_type:
                times.append(float(event["dur"]))
                break
        else:
            raise ModelError(
                f"{model}: the runtime's profile has no time for node {node.name!r} ({node.op_type})"
            )
    return times


def match_groups(groups: Sequence[FusionGroup], profile: OpProfile) -> GroupTimes:
    """The times of ``profile`` by the ``groups`` of the float model.

    The profile may be that of the float model or of a quantized one: both are matched with the same groups,
    so their times are comparable. Where the runtime fuses several groups (a layer normalization of small
    operators), one of them gets the time of all.
    """
    by_name = {group.name: group for group in groups}
    by_name |= {group.activation: group for group in groups if group.activation is not None}
    by_value = {value: group for group in groups for value in group.outputs}
    consumers = {value: node for node in reversed(profile.nodes) for value in node.inputs}
    times: dict[str, float] = defaultdict(float)
    overhead = []
    for node in profile.nodes:
        group = _group_of(node, by_name, by_value, consumers)
        if group is None:
            overhead.append(node)
        else:
            times[_main(group, node, by_value).name] += node.us
    return GroupTimes(dict(times), tuple(overhead))


def _group_of(
    node: NodeTime, by_name: Groups, by_value: Groups, consumers: Mapping[str, NodeTime]
) -> FusionGroup | None:
    """The group that ``node`` came from, by its name, its outputs, or its consumers."""
    if node.op_type in CONVERSIONS:
        group = by_name.get(node.name)
        return group if group is not None and group.op_type == node.op_type else None
    step: NodeTime | None = node
    for _ in range(LONGEST_CHAIN):
        if step is None:
            return None
        names = [*_origins(step.name)]
        values = [*names, *(origin for value in step.outputs for origin in _origins(value))]
        found = [by_name[n] for n in names if n in by_name] or [by_value[v] for v in values if v in by_value]
        if found:
            return found[0]
        step = consumers.get(step.outputs[0]) if step.outputs else None
    return None


def _main(group: FusionGroup, node: NodeTime, by_value: Groups) -> FusionGroup:
    """The heavy group that the runtime fused ``group`` into, such as a Sigmoid into a convolution."""
    op_type = node.op_type.removeprefix("Fused")
    step: FusionGroup | None = group
    for _ in range(LONGEST_CHAIN):
        if op_type not in HEAVY_OPS or step is None:
            return group
        if step.op_type == op_type:
            return step
        step = next((by_value[v] for v in step.inputs if v in by_value), None)
    return group


def _origins(name: str) -> Iterator[str]:
    """Possible names in the original model of the node or value ``name``, most likely first."""
    yield name
    name = re.sub(r"_token_\d+$", "", name)
    yield name
    yield re.sub(r"/\w+Fusion/?$", "", name.removeprefix("fused "))
    yield name.removesuffix("_nchwc")
    # Nodes that quantization inserts are named after the float value: relu_out_QuantizeLinear.
    yield re.sub(r"_[A-Z][A-Za-z]+(_output\d*)?(_\d+)?$", "", name)
