"""Random networks as ``.tflite`` agree with the same plan in onnxruntime, or are refused by name."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.onnx_models import Array
from support.tflite_models import run_tflite, write

from edgepack.errors import ExportError
from edgepack.ir.numerics import sqnr_db

CHANNELS, SIDE = 4, 6
LEAST_DB = 24.0
"""Least dB between two runtimes with the same int8 plan: some values differ by one, in each layer."""
Make = Callable[[np.random.Generator], dict[str, Array]]


def weight(*shape: int) -> Make:
    fan_in = int(np.prod(shape[1:]))
    return lambda rng: {"w": (rng.normal(size=shape) / fan_in**0.5).astype(np.float32)}


def ints(**arrays: list[int]) -> Make:
    return lambda rng: {name: np.array(values, np.int64) for name, values in arrays.items()}


def number(low: float, high: float) -> Make:
    return lambda rng: {"c": np.float32(rng.uniform(low, high)) * np.ones((), np.float32)}


def nothing(rng: np.random.Generator) -> dict[str, Array]:
    return {}


LAYERS: tuple[tuple[str, Make], ...] = (
    ("{y} = Conv <pads = [1, 1, 1, 1]> ({x}, {w})", weight(CHANNELS, CHANNELS, 3, 3)),
    ("{y} = Conv <group = 4, pads = [2, 2, 2, 2], dilations = [2, 2]> ({x}, {w})", weight(CHANNELS, 1, 3, 3)),
    ("{y} = Conv <group = 2> ({x}, {w})", weight(CHANNELS, 2, 1, 1)),
    ("{y}c = Conv ({x}, {w})  {y} = Relu ({y}c)", weight(CHANNELS, CHANNELS, 1, 1)),
    ("{y} = MatMul ({x}, {w})", weight(SIDE, SIDE)),
    ("{y} = Add ({x}, {older})", nothing),
    ("{y} = Mul ({x}, {c})", number(-2, 2)),
    ("{y} = Sub ({c}, {x})", number(-1, 1)),
    ("{y} = HardSwish ({x})", nothing),
    ("{y}s = Sigmoid ({x})  {y} = Mul ({x}, {y}s)", nothing),
    ("{y} = LeakyRelu <alpha = 0.1> ({x})", nothing),
    ("{y} = Softmax <axis = 1> ({x})", nothing),
    ("{y} = Transpose <perm = [0, 1, 3, 2]> ({x})", nothing),
    ("{y} = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({x})", nothing),
    ("{y} = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({x})", nothing),
    ("{y}a, {y}b = Split <axis = 1> ({x})  {y} = Concat <axis = 1> ({y}b, {y}a)", nothing),
    ("{y}g = Gather <axis = 1> ({x}, {i})  {y} = Add ({y}g, {x})", ints(i=[3, 1, 0, 2])),
    ("{y}r = Reshape ({x}, {s})  {y}t = Transpose <perm = [0, 2, 1, 3, 4]> ({y}r)  {y} = Reshape ({y}t, {q})",
     ints(s=[1, 2, 2, SIDE, SIDE], q=[1, CHANNELS, SIDE, SIDE])),
    ("{y}m = GlobalAveragePool ({x})  {y} = Mul ({x}, {y}m)", nothing),
    ("{y}p = Pad <mode = \"reflect\"> ({x}, {p})  {y} = Slice ({y}p, {b}, {e})",
     ints(p=[0, 0, 1, 0, 0, 0, 0, 1], b=[0, 0, 1, 1], e=[1, CHANNELS, SIDE + 1, SIDE + 1])),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(chosen=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=6), seed=st.integers(0, 2**16))
def test_random_networks(chosen: list[tuple[str, Make]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, lines = ["h"], ["h = Conv (x, w0)"]
    arrays = weight(CHANNELS, CHANNELS, 1, 1)(rng)
    arrays = {"w0": arrays["w"]}
    for i, (text, make) in enumerate(chosen, 1):
        own = {f"{name}{i}": array for name, array in make(rng).items()}
        arrays.update(own)
        names = {name.rstrip("0123456789"): name for name in own}
        lines.append(text.format(y=f"h{i}", x=values[-1], older=values[len(values) // 2], **names))
        values.append(f"h{i}")
    signature = f"float[1, {CHANNELS}, {SIDE}, {SIDE}]"
    body = f"net ({signature} x) => ({signature} {values[-1]}) {{ {'  '.join(lines)} }}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = write(Path(folder), body, arrays)
        except ExportError as refusal:
            assert "node" in str(refusal)
            return
        got = [run_tflite(made, sample)[values[-1]] for sample in made.samples]
    reference = [outputs[values[-1]] for outputs in made.reference]
    assert all(a.shape == b.shape for a, b in zip(got, reference, strict=True))
    assert sqnr_db(reference, got) > LEAST_DB
