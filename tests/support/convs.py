"""A few convolutions to quantize."""

import onnx_ir as ir
from support.onnx_models import Array
from support.quantizing import weight

CONV = {"w": weight(4, 4, 1, 1), "v": weight(4, 4, 1, 1, seed=2)}
IMAGE = "float[1,4,8,8]"
ANY = "float[a,b,c,d]"


def net(nodes: str, outputs: str = f"{ANY} y") -> str:
    return f"net ({IMAGE} x) => ({outputs}) {{ {nodes} }}"


def array(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()
