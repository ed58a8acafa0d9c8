"""Restore the original names of constants."""

import re

import onnx_ir as ir

_WORD = re.compile(r"_(folded|wide|slim|fit|sparse|clustered|\d+)$")
"""Suffixes that normalization and the passes append to the name of a constant whose content they change."""


def restore_constant_names(model: ir.Model, original: ir.Model) -> None:
    """Rename constants of ``model``, in place, to the names that they have in ``original``.

    Given: ``Conv(x, w_folded)``, where ``original`` has a constant ``w`` and the model has none. Result:
    ``Conv(x, w)``. A constant without counterpart in ``original`` keeps its new name.
    """
    known = {value.name for value in original.graph.initializers.values()}
    known |= {node.outputs[0].name for node in original.graph if node.op_type == "Constant"}
    graph = model.graph
    graphs = (graph, *graph.subgraphs())
    outputs = (v for g in graphs for node in g for v in node.outputs)
    stored = (v for g in graphs for v in (*g.inputs, *g.initializers.values()))
    taken = {value.name for value in (*outputs, *stored)}
    for value in list(graph.initializers.values()):
        name = value.name or ""
        while name not in known and (shorter := _WORD.sub("", name)) != name:
            name = shorter
        if name in known and name not in taken:
            value.name = name
            taken.add(name)
