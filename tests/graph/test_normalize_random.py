"""Random networks of the patterns that the rules match: normalization keeps their outputs."""

from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, given, settings
from support.normalizing import check
from support.onnx_models import Array, parse

CHANNELS = 4
Layer = tuple[str, Callable[[np.random.Generator], dict[str, Array]]]


def constants(*shape: int) -> Callable[[np.random.Generator], dict[str, Array]]:
    return lambda rng: {"c": np.asarray(rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape), np.float32)}


def weights(*shape: int) -> Callable[[np.random.Generator], dict[str, Array]]:
    return lambda rng: {"w": rng.normal(size=shape).astype(np.float32) / 4}


def norm(rng: np.random.Generator) -> dict[str, Array]:
    names = {"s": (0.5, 2), "b": (-1, 1), "m": (-1, 1), "v": (0.5, 2)}
    return {name: rng.uniform(*span, CHANNELS).astype(np.float32) for name, span in names.items()}


LAYERS: tuple[Layer, ...] = (
    ("{y} = Mul ({x}, {c})", constants(CHANNELS, 1, 1)),
    ("{y} = Mul ({c}, {x})", constants()),
    ("{y} = Add ({x}, {c})", constants(1, CHANNELS, 1, 1)),
    ("{y} = Sub ({c}, {x})", constants(1)),
    ("{y} = Sub ({x}, {c})", constants(CHANNELS, 1, 1)),
    ("{y} = Div ({x}, {c})", constants(1, 1)),
    ("{y} = Mul ({x}, {c})", constants(6)),
    ("{y} = Conv <pads = [1, 1, 1, 1]> ({x}, {w})", weights(CHANNELS, CHANNELS, 3, 3)),
    ("{y} = Conv <group = 2> ({x}, {w})", weights(CHANNELS, 2, 1, 1)),
    ("{y} = ConvTranspose <group = 2> ({x}, {w})", weights(CHANNELS, 2, 1, 1)),
    ("{y} = MatMul ({x}, {w})", weights(6, 6)),
    ("{y} = BatchNormalization ({x}, {s}, {b}, {m}, {v})", norm),
    ("{y} = Relu ({x})", lambda rng: {}),
    ("{y} = Identity ({x})", lambda rng: {}),
    ("{y} = Transpose <perm = [0, 1, 3, 2]> ({x})", lambda rng: {}),
    ("{y} = Add ({x}, {older})", lambda rng: {}),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    chosen=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=9),
    extra_output=st.integers(0, 9),
    seed=st.integers(0, 2**16),
)
def test_random_networks(chosen: list[Layer], extra_output: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, lines, arrays = ["x"], [], {}
    for i, (text, make) in enumerate(chosen):
        own = {f"{name}{i}": array for name, array in make(rng).items()}
        arrays.update(own)
        names = {name.rstrip("0123456789"): name for name in own}
        lines.append(text.format(y=f"h{i}", x=values[-1], older=values[len(values) // 2], **names))
        values.append(f"h{i}")
    outputs = [values[-1]] + ([values[extra_output]] if 0 < extra_output < len(values) - 1 else [])
    signature = ", ".join(f"float[n, {CHANNELS}, 6, 6] {name}" for name in outputs)
    body = f"net (float[n, {CHANNELS}, 6, 6] x) => ({signature}) {{ {'  '.join(lines)} }}"
    feeds = {"x": rng.normal(size=(2, CHANNELS, 6, 6)).astype(np.float32)}
    check(parse(body, weights=arrays), feeds, tolerance=1e-4)
