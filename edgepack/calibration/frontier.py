"""A layer-by-layer frontier: activations of all samples at a cut that moves through the graph.

The consumers of a layer must run again after the layer is changed. From the inputs of the model that costs
the square of the depth. A frontier keeps the activations that the rest of the graph consumes and computes the
next subgraph from them: all subgraphs together cost one run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.config.target import Runtime
from edgepack.data.samples import Samples
from edgepack.errors import CalibrationError
from edgepack.ir.files import save_model
from edgepack.ir.model import constant, name_of
from edgepack.runtime.session import open_session

Array = npt.NDArray[np.generic]
Change = Callable[[ir.Graph], None]

MEMORY_BYTES = 128 << 20
"""Memory for the values of one frontier; further values are kept in files."""


def supports_frontier(model: ir.Model) -> bool:
    """Whether ``model`` can be run layer by layer: no control flow, every value a typed tensor."""
    for node in model.graph:
        kinds = (a.type for a in node.attributes.values())
        if any(kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for kind in kinds):
            return False
        if any(v.name and v.uses() and not isinstance(v.type, ir.TensorType) for v in node.outputs):
            return False
    return True


@dataclass(slots=True)
class Frontier:
    """Values of all samples at a cut through ``model``; ``wanted``: all values that will be requested."""

    model: ir.Model
    samples: Samples
    wanted: Sequence[str]
    folder: Path
    """For subgraphs, and for values that do not fit in memory."""
    threads: int
    keys: list[str] = field(init=False)
    values: list[dict[str, Array | Path]] = field(init=False)
    open: set[ir.Node] = field(init=False)
    """Nodes that have not run yet."""

    def __post_init__(self) -> None:
        read = [(sample.key, sample.feeds) for sample in self.samples]
        self.keys = [key for key, _ in read]
        self.values = [dict(feeds) for _, feeds in read]
        self.open = set(self._needed_for(self.wanted, stop=()))

    def advance(self, names: Sequence[str], change: Change = lambda graph: None) -> None:
        """Compute the values ``names`` of all samples; ``change`` may rewrite the subgraph that computes
        them.

        Raises:
            CalibrationError: the runtime fails on a sample.
        """
        live = self.values[0].keys()
        nodes = self._needed_for([n for n in names if n not in live], stop=live)
        if not nodes:
            return
        inside = set(nodes)
        self.open -= inside
        made = [v for node in nodes for v in node.outputs if v.name]
        outputs = [v for v in made if v.name in names or self._is_needed(v)]
        inputs = {v for node in nodes for v in node.inputs if v is not None and v.producer() not in inside}
        feeds = sorted(name_of(v) for v in inputs if constant(v) is None)
        subgraph = self._subgraph(feeds, [name_of(v) for v in outputs], change)
        self._run(subgraph, feeds, [name_of(v) for v in outputs])
        graph_values = {v.name: v for node in self.model.graph for v in (*node.inputs, *node.outputs) if v}
        for name in list(live):
            if name not in names and not self._is_needed(graph_values.get(name)):
                for sample in self.values:
                    if isinstance(gone := sample.pop(name), Path):
                        gone.unlink()

    def value(self, sample: int, name: str) -> Array:
        """A value at the frontier."""
        found = self.values[sample][name]
        return np.load(found) if isinstance(found, Path) else found

    def _is_needed(self, value: ir.Value | None) -> bool:
        return value is not None and any(use.node in self.open for use in value.uses())

    def _needed_for(self, names: Iterable[str], stop: Iterable[str]) -> list[ir.Node]:
        """Nodes that compute ``names`` from the values ``stop``, in graph order."""
        wanted, known, found = set(names), set(stop), set()
        for node in reversed(list(self.model.graph)):
            if any(v.name in wanted and v.name not in known for v in node.outputs if v.name):
                found.add(node)
                wanted.update(v.name for v in node.inputs if v is not None and v.name)
        return [node for node in self.model.graph if node in found]

    def _subgraph(self, inputs: Sequence[str], outputs: Sequence[str], change: Change) -> Path:
        graph = ir.convenience.extract(self.model.graph, inputs, outputs)
        change(graph)
        path = self.folder / "subgraph.onnx"
        subgraph = ir.Model(
            graph, ir_version=self.model.ir_version, functions=list(self.model.functions.values())
        )
        save_model(subgraph, path, check=False)
        return path

    def _run(self, subgraph: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        session = open_session(subgraph, Runtime(threads=self.threads), lean=True)
        in_memory = 0
        for number, values in enumerate(self.values):
            in_memory += sum(v.nbytes for v in values.values() if isinstance(v, np.ndarray))
            feeds = {name: self.value(number, name) for name in inputs}
            try:
                made = session.run(list(outputs), feeds)
            except Exception as error:
                raise CalibrationError(
                    f"the float model fails on sample {self.keys[number]}: {str(error).splitlines()[0]}"
                ) from error
            for name, array in zip(outputs, made, strict=True):
                in_memory += array.nbytes
                if in_memory > MEMORY_BYTES and array.nbytes > 1 << 16:
                    path = self.folder / f"{number}_{len(self.open)}_{outputs.index(name)}.npy"
                    np.save(path, array)
                    values[name] = path
                else:
                    values[name] = array


def stages(nodes: Mapping[str, ir.Node], order: Iterable[ir.Node]) -> list[list[str]]:
    """Names of ``nodes`` in stages: the inputs of a node depend on nodes of earlier stages only."""
    depth: dict[ir.Value, int] = {}
    found: dict[int, list[str]] = {}
    for node in order:
        deepest = max((depth.get(v, 0) for v in node.inputs if v is not None), default=0)
        mine = node.name in nodes
        if mine:
            found.setdefault(deepest, []).append(str(node.name))
        depth.update(dict.fromkeys(node.outputs, deepest + mine))
    return [found[key] for key in sorted(found)]
