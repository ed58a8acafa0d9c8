"""Hard activations: HardSigmoid and HardSwish by integer kernels of Add and Mul; saturation is their clip.

``HardSigmoid(x) = clip(alpha x + beta, 0, 1) = alpha * clip(x + beta / alpha, 0, 1 / alpha)``: an Add
whose output is quantized from 0 to 1 / alpha, with saturation, and dequantized as from 0 to 1.

Given::

    q -> DQ -> HardSwish -> y -> Q

Result (u8; the gate is quantized with a scale of 6/255 and dequantized with 1/255)::

    q -> DQ -> Add(3) -> Q(6/255) -> DQ(1/255) -> Mul -> y -> Q
          '---------------------------------------^
"""

import numpy as np
import onnx_ir as ir

from edgepack.ir.model import name_of
from edgepack.ir.numerics import choose_params, quantize
from edgepack.ir.scheme import QuantParams, QuantScheme
from edgepack.quantization.rewrite.emit import Emitter

HARD_ACTIVATIONS = frozenset(["HardSigmoid", "HardSwish"])
DEFAULT_ALPHA, DEFAULT_BETA = 0.2, 0.5
STEPS = 255


def gate_params(scheme: QuantScheme, alpha: float = 1.0) -> QuantParams:
    """Parameters of a gate from 0 to ``1 / alpha`` over the whole range of the scheme's type."""
    kind = scheme.type
    scale = np.asarray(1 / (alpha * (kind.qmax - kind.qmin)), np.float32)
    return QuantParams(kind, scale, np.asarray(kind.qmin, kind.dtype))


def slope_of(node: ir.Node) -> tuple[float, float]:
    """``alpha`` and ``beta`` of a HardSigmoid, or of the one in a HardSwish."""
    if node.op_type == "HardSwish":
        return 1 / 6, 0.5
    return node.attributes.get_float("alpha", DEFAULT_ALPHA), node.attributes.get_float("beta", DEFAULT_BETA)


def apply_hard_activation(emit: Emitter, node: ir.Node, scheme: QuantScheme) -> None:
    """Replace a static HardSigmoid or HardSwish; Q/DQ around it exist already."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    alpha, beta = slope_of(node)
    base = name_of(y)
    shift = beta / alpha
    params = choose_params(min(shift, 0.0), max(shift, 0.0), scheme)
    constant = emit.dequantized(
        node, f"{base}_shift", quantize(np.asarray(shift, np.float32), params), params, state_zero=True
    )
    add = emit.node("Add", [x, constant], f"{base}_shifted")
    wide = gate_params(scheme, alpha)
    if node.op_type == "HardSwish":
        store, restore = emit.pair(add.outputs[0], wide, f"{base}_gate")
        restore.replace_input_with(1, emit.scale(f"{base}_unit", gate_params(scheme)))
        swish = emit.node("Mul", [x, restore.outputs[0]], base)
        swish.name = node.name
        emit.replace(node, [add, store, restore, swish], swish.outputs[0])
        return
    add.name = node.name
    store = next(n for n in y.consumers() if n.op_type == "QuantizeLinear")
    store.replace_input_with(1, emit.scale(f"{base}_gate", wide))
    emit.replace(node, [add], add.outputs[0])
