"""Single operators to quantize, with the expected kernels and fidelity."""

from dataclasses import dataclass, field

from support.onnx_models import Array
from support.quantizing import CHANNEL, TENSOR, Built, weight

GRANULARITIES = [CHANNEL, TENSOR]
STORABLE = ("Gather", "MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU")


@dataclass(frozen=True)
class Case:
    """A float model, the int8 kernels that static quantization must give, least dB by precision."""

    body: str
    weights: dict[str, Array]
    kernels: dict[str, int] = field(default_factory=dict)
    static_db: float = 0
    dynamic_db: float = 0
    weight_only_db: float = 0
    feeds: dict[str, Array] = field(default_factory=dict)


def check(made: Built, case: Case, floor: float) -> None:
    assert made.fused.integer_kernels == case.kernels
    assert made.fused.float_operators == {}
    outputs = len(made.model.graph.outputs)
    assert made.fused.leftover_quantize <= 1
    assert made.fused.leftover_dequantize <= outputs
    assert made.sqnr_db >= floor


def recurrent(op: str, directions: int, outputs: str = "y, h") -> Case:
    gates = {"LSTM": 4, "GRU": 3}[op]
    way = "bidirectional" if directions == 2 else "forward"
    shapes = {"y": "float[a,b,c,d] y", "h": "float[e,f,g] h"}
    given = ", ".join(shape for name, shape in shapes.items() if name in outputs)
    node = f'{outputs} = {op}<hidden_size=10,direction="{way}">(x, w, r, b)'
    body = f"net (float[6,2,8] x) => ({given}) {{ {node} }}"
    weights = {
        "w": weight(directions, 10 * gates, 8, scale=0.3),
        "r": weight(directions, 10 * gates, 10, seed=2, scale=0.3),
        "b": weight(directions, 20 * gates, seed=3, scale=0.2),
    }
    return Case(body, weights)
