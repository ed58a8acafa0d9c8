"""Profile: where the time of a run goes, by node of the graph that the runtime executes.

What onnxruntime 1.32 calls its nodes, by which they are matched to those of the model it was given:

- a fused integer operator keeps the name of its float node (``QLinearAdd`` for ``Add``, ``QGemm`` for
  ``Gemm``, ``QLinearMatMul`` for ``MatMul``); the QuantizeLinear and DequantizeLinear around it are gone;
- a convolution or pooling that was moved to channels-last adds ``_token_7`` to it, whatever the number;
- a float convolution in the NCHWc layout is called after the value that leaves it, activation included:
  ``relu_out_nchwc`` for ``conv -> relu -> relu_out``;
- float fusions are called ``fused gemm``, ``mul/LayerNormFusion/``, ``matmul/MatMulScaleFusion/``, or have a
  name of their own (``Gelu``, ``BiasGelu_token_5``); all keep the name of the value that leaves them;
- operators without a kernel are unfolded to nodes without a name (``HardSwish`` to ``HardSigmoid`` and
  ``Mul``); the profile calls these by operator and index, ``HardSigmoid_447``;
- layout changes (``Transpose``, ``Transpose_token_27``, ``ReorderInput``, ``ReorderOutput``) are new nodes,
  and a DequantizeLinear with several readers becomes several, ``x_DequantizeLinear/duplicated``.

Profiling costs about 2 µs a node, and a duration is a whole number of microseconds. The cost per node is
found from runs without profiling and taken off, so that times do not add up to more than a run; what remains
of a node under a microsecond is still a guess.
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
"""What the runtime puts between nodes; matched only where the model has such a node itself."""
MOST_PROFILING_US = 5.0
"""What profiling can cost a node; what is more has another cause."""
LONGEST_CHAIN = 4
"""Nodes that one operator is unfolded to, and groups that are fused to one, at most."""

HEAVY_OPS = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])
"""What the runtime fuses other groups into, and calls by the value that leaves the last of them."""


class FusionGroup(Protocol):
    """What is asked of the groups that a profile is matched with: nodes with the activation that follows."""

    @property
    def name(self) -> str:
        """The main node's name."""

    @property
    def op_type(self) -> str:
        """The main node's operator."""

    @property
    def activation(self) -> str | None:
        """The name of the activation's node."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Values that enter, without constants."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Values that leave."""


Groups = Mapping[str, FusionGroup]


@dataclass(frozen=True, slots=True)
class NodeTime:
    """One executed node."""

    name: str
    op_type: str
    us: float
    """Median microseconds of a run."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OpProfile:
    """Times of one model's nodes, in the order of execution."""

    nodes: tuple[NodeTime, ...]
    run_us: float
    """A run without profiling, as the bench measures it."""
    profiling_us: float
    """What profiling added to each node; taken off already."""

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
    """Microseconds by group name; a group that the runtime fused into another has none of its own."""
    overhead: tuple[NodeTime, ...]
    """Nodes that belong to no group: conversions, layout changes."""

    @property
    def overhead_us(self) -> float:
        """Microseconds of the overhead."""
        return sum(node.us for node in self.overhead)


def profile_ops(model: Path, runtime: Runtime, feeds: Sequence[Feeds], *, runs: int = 20) -> OpProfile:
    """Time each node of ``model`` over ``runs`` runs on ``feeds`` in turn, after one that does not count.

    Nodes in the body of a Loop or If count as part of it.

    Raises:
        ModelError: the runtime refuses the model, or its profile is not of the graph that it wrote.
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
    """Times ``profiled_us`` [nodes] without what profiling added to each, and that.

    What the sum is over ``run_us``, the time of a run that is not profiled, is taken off evenly: writing an
    event costs the same for every node, and no more than ``MOST_PROFILING_US``. What then is too much is not
    the profiler's (nodes are timed by the wall clock, which runs on while others have the core) and grows
    with the time of a node: it is taken off by share.
    """
    over = max(float(profiled_us.sum()) - run_us, 0.0)
    extra = min(over / max(len(profiled_us), 1), MOST_PROFILING_US)
    left = np.maximum(profiled_us - extra, 0.0)
    return left * min(run_us / max(float(left.sum()), run_us, 1e-9), 1.0), extra


def _runs(events: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The node events of one run after another: an event is written when what it times has ended."""
    found: list[dict[str, Any]] = []
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            found.append(event)
        elif event["name"] == "model_run":
            yield found
            found = []


def _aligned(nodes: Sequence[ir.Node], events: Sequence[dict[str, Any]], model: Path) -> list[float]:
    """Microseconds of ``nodes`` in a run that gave ``events``; those of subgraphs are passed over."""
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

    The profile may be that of the float model or of any quantized form of it: both are matched by the same
    groups, so their times can be set side by side. Where the runtime fuses several groups (a layer
    normalization written as small operators) one of them has the time of all.
    """
    by_name = {group.name: group for group in groups}
    by_name |= {group.activation: group for group in groups if group.activation is not None}
    by_value = {value: group for group in groups for value in group.outputs}
    readers = {value: node for node in reversed(profile.nodes) for value in node.inputs}
    times: dict[str, float] = defaultdict(float)
    overhead = []
    for node in profile.nodes:
        group = _group_of(node, by_name, by_value, readers)
        if group is None:
            overhead.append(node)
        else:
            times[_main(group, node, by_value).name] += node.us
    return GroupTimes(dict(times), tuple(overhead))


def _group_of(
    node: NodeTime, by_name: Groups, by_value: Groups, readers: Mapping[str, NodeTime]
) -> FusionGroup | None:
    """The group that ``node`` came from, by its name, by the value that leaves it, or by who reads it."""
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
        step = readers.get(step.outputs[0]) if step.outputs else None
    return None


def _main(group: FusionGroup, node: NodeTime, by_value: Groups) -> FusionGroup:
    """The heavy group behind ``group``, where the runtime fused that into it: Sigmoid into a convolution."""
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
    """Names of nodes or values that the node or value of this name may stand for, most likely first."""
    yield name
    name = re.sub(r"_token_\d+$", "", name)
    yield name
    yield re.sub(r"/\w+Fusion/?$", "", name.removeprefix("fused "))
    yield name.removesuffix("_nchwc")
    # What quantization puts in the place of a float node is called after its value: relu_out_QuantizeLinear.
    yield re.sub(r"_[A-Z][A-Za-z]+(_output\d*)?(_\d+)?$", "", name)
