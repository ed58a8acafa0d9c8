"""Concat as CONCATENATION: inputs in one order of axes and one scale."""

from edgepack.export.tflite.lowering import Lowering
from edgepack.export.tflite.tasks import Output, Task


def concat(low: Lowering, task: Task) -> None:
    """Concat; int8 inputs get the parameters of the output."""
    node = task.node
    rank = len(low.shape(task.output))
    axis = node.attributes.get_int("axis", 0) % rank
    order = low.common_order(node.inputs, rank)
    inputs = [v for v in node.inputs if v is not None and 0 not in low.shape(v)]
    tensors = [low.read(v, order, integer=task.integer) for v in inputs]
    if task.integer:
        tensors = [low.requantize(t, low.planned(task.output)) for t in tensors]
    low.write(task, "CONCATENATION", tensors, Output(order), options={"axis": order.index(axis)})
