"""Shape inference, without names that an earlier inference made up."""

import onnx_ir as ir
import onnx_ir.passes.common as passes


def infer_shapes(model: ir.Model) -> None:
    """Shape inference over everything.

    Names that an earlier inference made up are forgotten first: it knew less, and only names of one run
    mean the same dimension when they are the same.
    """
    forget_made_up_names(model)
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def forget_made_up_names(model: ir.Model) -> None:
    """Make dimensions unknown again that shape inference gave a name of its own."""
    for graph in model.graphs():
        for value in (v for node in graph for v in node.outputs if not v.is_graph_output()):
            if value.shape is not None and not value.shape.is_static():
                known = [d if isinstance(d, int) or not _made_up(d) else None for d in value.shape]
                value.shape = ir.Shape(known)


def _made_up(dimension: ir.SymbolicDim) -> bool:
    return (dimension.value or "").startswith("unk__")
