"""Networks with all kinds of coupled channels, for channel pruning."""

import re

import onnx_ir as ir
from support.onnx_models import Array, batch_norm, f32, i64, parse
from support.quantizing import weight

from edgepack.graph.normalize import normalize

IMAGE = "net (float[1, 6, 8, 8] x) => (float[a, b, c, d] y)"


W = {
    "w": weight(12, 6, 3, 3), "b": weight(12, seed=1), "d": weight(12, 1, 3, 3, seed=2),
    "g": weight(12, 3, 1, 1, seed=3), "v": weight(5, 12, 1, 1, seed=4), "w2": weight(12, 6, 1, 1, seed=5),
    "v24": weight(5, 24, 1, 1, seed=6), "v6": weight(5, 6, 1, 1, seed=7), "v3": weight(5, 3, 1, 1, seed=8),
    "t": weight(12, 5, 2, 2, seed=9), "s1": weight(4, 12, 1, 1, seed=10), "s2": weight(12, 4, 1, 1, seed=11),
    "fc": weight(192, 7, seed=12), "slope": weight(12, 1, 1, seed=13), "v48": weight(5, 48, 1, 1, seed=14),
    "six": i64([6, 6]), "from": i64([2]), "to": i64([9]), "one": i64([1]), "v7": weight(5, 7, 1, 1, seed=15),
    "two": i64([1, 2, 6, 8, 8]), "back": i64([0, 12, 8, -1]), "flat": i64([1, -1]),
    "order": i64([3, 1, 7, 1]),
    "v4": weight(5, 4, 1, 1, seed=16), "scales": f32([1, 1, 2, 2]), "sizes": i64([1, 12, 5, 5]),
    "pads": i64([0, 0, 1, 1, 0, 0, 1, 1]), "rows": weight(8, 8, seed=17), "axes": i64([2, 3]),
    "gdw": weight(24, 1, 3, 3, seed=18), "lo": f32(-0.5), "hi": f32(2), **batch_norm("bn", 12),
}  # fmt: skip


CONV = "h = Conv <pads = [1, 1, 1, 1]> (x, w, b)"


PRUNED = {
    "two convolutions": f"{CONV} r = Relu (h) y = Conv (r, v)",
    "clip, batch norm, prelu": f"{CONV} n = BatchNormalization (h, bn_scale, bn_bias, bn_mean, bn_var)"
    " p = PRelu (n, slope) r = Clip (p, lo, hi) y = Conv (r, v)",
    "depthwise": f"{CONV} k = Conv <group = 12> (h, d, b) y = Conv (k, v)",
    "depthwise, two for each": f"{CONV} k = Conv <group = 12> (h, gdw) y = Conv (k, v24)",
    "groups of three": f"{CONV} k = Conv <group = 4> (h, g, b) y = Conv (k, v)",
    "residual": f"{CONV} k = Conv (x, w2) r = Add (h, k) q = Relu (r) y = Conv (q, v)",
    "squeeze and excitation": f"{CONV} m = GlobalAveragePool (h) i = Conv (m, s1) j = Relu (i)"
    " l = Conv (j, s2, b) e = Sigmoid (l) q = Mul (h, e) y = Conv (q, v)",
    "transposed": f"{CONV} y = ConvTranspose <strides = [2, 2]> (h, t)",
    "concat": f"{CONV} k = Conv (x, w2) c = Concat <axis = 1> (h, k) y = Conv (c, v24)",
    "concat with the input": f"{CONV} c = Concat <axis = 1> (h, x) e = Conv (c, w18) y = Conv (e, v)",
    "split": f"{CONV} l, m = Split <axis = 1> (h, six) q = Mul (l, m) y = Conv (q, v6)",
    "slice": f"{CONV} l = Slice (h, from, to, one) p = Conv (l, v7) q = Conv (h, v) y = Add (p, q)",
    "gather": f"{CONV} l = Gather <axis = 1> (h, order) p = Conv (l, v4) q = Conv (h, v) y = Add (p, q)",
    "channel shuffle": f"{CONV} r = Reshape (h, two) t1 = Transpose <perm = [0, 2, 1, 3, 4]> (r)"
    " u = Reshape (t1, back) y = Conv (u, v)",
    "depth to space": f"{CONV} l = DepthToSpace <blocksize = 2> (h) y = Conv (l, v3)",
    "depth to space, other order": f'{CONV} l = DepthToSpace <blocksize = 2, mode = "CRD"> (h)'
    " y = Conv (l, v3)",
    "space to depth": f"{CONV} l = SpaceToDepth <blocksize = 2> (h) y = Conv (l, v48)",
    "pools": f"{CONV} l = MaxPool <kernel_shape = [2, 2]> (h) m = AveragePool <kernel_shape = [2, 2]> (l)"
    " y = Conv (m, v)",
    "resize": f"{CONV} l = Resize (h, , scales) m = Resize (l, , , sizes) y = Conv (m, v)",
    "pad": f"{CONV} l = Pad (h, pads) y = Conv (l, v)",
    "rows": f"{CONV} l = MatMul (h, rows) y = Conv (l, v)",
    "reduction": f"{CONV} l = ReduceMean <axes = [2, 3]> (h) y = Conv (l, v)",
}


W["w18"] = weight(12, 18, 1, 1, seed=19)


def model_of(text: str, weights: dict[str, Array] = W) -> ir.Model:
    used = {k: v for k, v in weights.items() if re.search(rf"\b{k}\b", text)}
    return normalize(parse(text, weights=used), min_opset=13, max_opset=21)[0]
