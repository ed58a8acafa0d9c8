"""A small network for pruning, with samples and second moments."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
from support.onnx_models import Array, f32, parse
from support.quantizing import target, weight

from edgepack.compression.prune import PrunedWeight, prune
from edgepack.config.passes import Prune
from edgepack.config.recipe import Data
from edgepack.data.samples import Samples, open_samples
from edgepack.graph.normalize import normalize
from edgepack.ir.inputs import input_specs
from edgepack.quantization.groups import find_fusion_groups

NET = """net (float[1, 6, 10, 10] x) => (float[1, 5] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
    r = Relu (a)
    d = Conv <group = 16> (r, w1)
    s = Relu (d)
    g = GlobalAveragePool (s)
    f = Flatten (g)
    y = Gemm (f, w2, b2)
}"""


WEIGHTS = {
    "w0": weight(16, 6, 3, 3), "b0": weight(16, seed=1), "w1": weight(16, 1, 3, 3, seed=2),
    "w2": weight(16, 5, seed=3), "b2": weight(5, seed=4),
}  # fmt: skip


def moments(columns: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    x = f32(rng.normal(size=(columns, columns)) @ rng.normal(size=(columns, 4 * columns)))
    return np.asarray((x @ x.T / x.shape[1])[None], np.float32)


def data(folder: Path) -> Samples:
    np.savez(folder / "x.npz", x=weight(12, 1, 6, 10, 10, seed=9))
    model = parse(NET, weights=WEIGHTS)
    return open_samples(Data(path=str(folder / "x.npz")), "calibration", input_specs(model), {}, base=folder)


def pruned(
    folder: Path, nodes: str = NET, **settings: object
) -> tuple[ir.Model, ir.Model, tuple[PrunedWeight, ...]]:
    model, _ = normalize(parse(nodes, weights=WEIGHTS), min_opset=13, max_opset=21)
    groups = find_fusion_groups(model, target().kernels)
    config = Prune.model_validate(settings)
    return model, *prune(model, groups, data(folder), config, threads=1, seed=0)
