import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from support.quantizing import weight

from edgepack.ir.numerics import sqnr_db
from edgepack.quantization.weights.smoothquant import MAX_FACTOR, STRENGTHS, smoothing_factors

Floats = npt.NDArray[np.float32]


def rows(spread: Floats, seed: int = 0, samples: int = 6) -> Floats:
    """Samples of ten rows whose channels have the given spread."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=(samples, 10, spread.size)) * spread, np.float32)


def factors_for(w: Floats, x: Floats) -> Floats | None:
    return smoothing_factors([w], x.min(axis=1), x.max(axis=1), (x**2).mean(axis=(0, 1)))


def dynamic(w: Floats, x: Floats) -> Floats:
    """The MatMul as the runtime computes it: u8 per tensor times s8 per output."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    stored = np.clip(np.rint(x / step) - np.rint(low / step), 0, 255) + np.rint(low / step)
    scale = np.abs(w).max(axis=1, keepdims=True) / 127
    return np.asarray((stored * step) @ (np.rint(w / scale) * scale).T, np.float32)


def test_outliers_are_smoothed_and_the_error_is_smaller() -> None:
    spread = np.ones(64, np.float32)
    spread[[3, 40]] = 60.0
    w, x = weight(32, 64), rows(spread)
    factors = factors_for(w, x)
    assert factors is not None
    exact = [row @ w.T for row in x]
    plain = sqnr_db(exact, [dynamic(w, row) for row in x])
    smooth = sqnr_db(exact, [dynamic(w * factors, row / factors) for row in x])
    assert smooth > plain + 6


def test_channels_of_equal_range_are_not_changed() -> None:
    """SmoothQuant without gain would cost a pass over the activation."""
    assert factors_for(weight(32, 64), rows(np.ones(64, np.float32))) is None


@given(seed=st.integers(0, 50), peak=st.floats(1, 1e4))
def test_the_float_output_is_the_same(seed: int, peak: float) -> None:
    spread = np.ones(16, np.float32)
    spread[seed % 16] = peak
    w, x = weight(8, 16, seed=seed), rows(spread, seed)
    factors = factors_for(w, x)
    if factors is not None:
        assert (factors > 0).all() and factors.max() <= MAX_FACTOR and factors.min() >= 1 / MAX_FACTOR
        exact = x[0].astype(np.float64) @ w.T.astype(np.float64)
        again = (x[0] / factors).astype(np.float64) @ (w * factors).T.astype(np.float64)
        assert sqnr_db(exact, again) > 100


def test_a_channel_that_is_always_zero() -> None:
    spread = np.ones(16, np.float32)
    spread[0], spread[5] = 0.0, 100.0
    factors = factors_for(weight(8, 16), rows(spread))
    assert factors is not None and np.isfinite(factors).all()


@given(seed=st.integers(0, 200))
def test_factors_are_those_of_the_paper_for_one_of_the_strengths(seed: int) -> None:
    """``range(x)^a / range(w)^(1 - a)`` (Xiao et al., 2023, equation 4), up to a common factor."""
    rng = np.random.default_rng(seed)
    spread = np.asarray(np.exp(rng.uniform(0, 3, 16)), np.float32)
    w = weight(8, 16, seed=seed) * np.asarray(np.exp(rng.uniform(-2, 0, 16)), np.float32)
    x = rows(spread, seed)
    factors = factors_for(w, x)
    if factors is None:
        return
    range_x, range_w = np.abs(x).max(axis=(0, 1)), np.abs(w).max(axis=0)
    off = []
    for strength in STRENGTHS:
        paper = range_x**strength / range_w ** (1 - strength)
        paper = np.clip(paper / np.exp(np.log(paper).mean()), 1 / MAX_FACTOR, MAX_FACTOR)
        off.append(float(np.abs(np.log(factors / paper)).max()))
    assert min(off) < 1e-4


def test_factors_are_found_for_uneven_channels() -> None:
    spread = np.asarray(np.geomspace(1, 60, 16), np.float32)
    assert (
        factors_for(weight(8, 16) * np.asarray(np.geomspace(1, 0.05, 16), np.float32), rows(spread))
        is not None
    )
