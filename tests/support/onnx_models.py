"""Tiny models for tests, and how to run them."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort

from edgepack.ir.model import clone, walk_nodes
from edgepack.runtime.host import overflows
from edgepack.runtime.unsigned_weights import make_weights_unsigned

Array = npt.NDArray[Any]

IR_VERSIONS = {6: 3, 7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7, 14: 7}
"""IR version by opset, as exporters of the time wrote it; 8 for newer opsets."""


def parse(body: str, *, opset: int = 17, weights: Mapping[str, Array] | None = None) -> ir.Model:
    """A model from ONNX text, ``name (inputs) => (outputs) { nodes }``.

    ``weights`` become initializers; before IR version 4 (opset 9) also inputs, as required then.
    """
    header = f'<ir_version: {IR_VERSIONS.get(opset, 8)}, opset_import: ["" : {opset}]>\n'
    proto = onnx.parser.parse_model(header + body)
    for name, array in (weights or {}).items():
        tensor = onnx.numpy_helper.from_array(np.asarray(array), name)
        proto.graph.initializer.append(tensor)
        if proto.ir_version < 4 and name not in {value.name for value in proto.graph.input}:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    return ir.from_proto(proto)


def f32(numbers: npt.ArrayLike) -> Array:
    """A float32 array."""
    return np.asarray(numbers, np.float32)


def i64(numbers: npt.ArrayLike) -> Array:
    """An int64 array."""
    return np.asarray(numbers, np.int64)


def run(model: ir.Model | Path, feeds: Mapping[str, Array], *, optimize: bool = True) -> dict[str, Array]:
    """All outputs of a model by name, from onnxruntime on one thread, with exact int8 matrix products."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if overflows():
        copy = ir.load(model) if isinstance(model, Path) else clone(model)
        model = copy if make_weights_unsigned(copy, int8_activations=False) else model
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def difference(left: Mapping[str, Array], right: Mapping[str, Array]) -> float:
    """The largest absolute difference over the largest absolute value, of the worst output."""
    assert list(left) == list(right)
    worst = 0.0
    for name, a in left.items():
        b = right[name]
        assert a.shape == b.shape and a.dtype == b.dtype, (name, a.shape, b.shape, a.dtype, b.dtype)
        if a.size:
            delta = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
            worst = max(worst, delta / max(float(np.abs(a.astype(np.float64)).max()), 1e-12))
    return worst


def ops(model: ir.Model) -> Counter[str]:
    """The number of nodes of each operator type, including subgraphs."""
    return Counter(node.op_type for node in walk_nodes(model.graph))


def randoms(**shapes: tuple[int, ...]) -> dict[str, Array]:
    """Normal float32 arrays by name, always the same for the same shapes."""
    rng = np.random.default_rng(sum(map(sum, shapes.values())))
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def batch_norm(prefix: str, channels: int, seed: int = 1) -> dict[str, Array]:
    """``<prefix>_scale, _bias, _mean, _var`` as after training."""
    rng = np.random.default_rng(seed)
    return {
        f"{prefix}_scale": rng.uniform(0.5, 2, channels).astype(np.float32),
        f"{prefix}_bias": rng.normal(size=channels).astype(np.float32),
        f"{prefix}_mean": rng.normal(size=channels).astype(np.float32),
        f"{prefix}_var": rng.uniform(0.5, 2, channels).astype(np.float32),
    }


def conv_net() -> ir.Model:
    """Conv, BatchNormalization, Relu, depthwise Conv, pooling, Gemm: ``x[batch, 3, 8, 8] -> y[batch, 5]``."""
    body = """net (float[batch, 3, 8, 8] x) => (float[batch, 5] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w1)
        n = BatchNormalization (c, bn_scale, bn_bias, bn_mean, bn_var)
        r = Relu (n)
        d = Conv <pads = [1, 1, 1, 1], group = 4> (r, w2, b2)
        s = Relu (d)
        g = GlobalAveragePool (s)
        f = Flatten (g)
        y = Gemm <transB = 1> (f, w3, b3)
    }"""
    shapes = {"w1": (4, 3, 3, 3), "w2": (4, 1, 3, 3), "b2": (4,), "w3": (5, 4), "b3": (5,)}
    return parse(body, weights={**randoms(**shapes), **batch_norm("bn", 4)})
