"""Growing histograms, and the ranges that observers compute from them."""

import time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from support.observing import CONFIG, LEVELS, bounds, measured

from edgepack.calibration.histogram import StreamingHistogram, TensorStats
from edgepack.calibration.observers import OBSERVERS, divergences, smoothed, squared_error
from edgepack.config.recipe import Calibration

Array = npt.NDArray[np.float32]
any_float = st.builds(np.ldexp, st.integers(-(2**24), 2**24), st.integers(-60, 60)).map(np.float32)
tame = st.floats(-1000, 1000, width=32)


def normal(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(count, dtype=np.float32)


@given(
    x=arrays(np.float32, array_shapes(max_dims=3), elements=any_float), bins=st.sampled_from([128, 129, 1000])
)
@settings(deadline=None)
def test_every_value_is_counted_in_the_bin_that_holds_it(x: Array, bins: int) -> None:
    histogram = measured(x, bins=bins).histogram
    numbers = np.floor(x.astype(np.float64).ravel() / histogram.width) - histogram.first
    expected = np.bincount(numbers.astype(int), minlength=len(histogram.counts))
    np.testing.assert_array_equal(histogram.counts, expected)
    assert len(histogram.counts) <= 2 * bins


@given(
    samples=st.lists(
        arrays(np.float32, array_shapes(max_dims=2), elements=any_float), min_size=2, max_size=6
    ),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_order_shapes_and_number_of_arrays_change_nothing(samples: list[Array], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(samples))
    whole = measured(np.concatenate([s.ravel() for s in samples]), bins=128).histogram
    parts = measured(*(samples[i] for i in order), bins=128).histogram
    assert (parts.first, parts.exponent) == (whole.first, whole.exponent)
    np.testing.assert_array_equal(parts.counts, whole.counts)


@given(scale=st.floats(1e-20, 1e30), offset=st.floats(-10, 10))
@settings(max_examples=30)
def test_resolution_is_the_range_over_bins_or_better(scale: float, offset: float) -> None:
    x = (np.linspace(-1, 1, 5000) + offset).astype(np.float32) * np.float32(scale)
    histogram = measured(x[:100], x[100:], bins=1000).histogram
    assert histogram.width <= (float(x.max()) - float(x.min())) / 1000


def test_values_larger_than_a_chunk_are_all_counted() -> None:
    x = normal(1_000_000)
    assert measured(x).histogram.counts.sum() == x.size


def test_memory_stays_the_same_however_many_samples() -> None:
    stats = measured(*(normal(50, seed) * 10**seed for seed in range(30)))
    assert stats.histogram.counts.nbytes <= 2 * 2048 * 8
    assert stats.histogram.counts.sum() == 30 * 50


def test_a_constant_then_a_wide_array_lose_nothing() -> None:
    histogram = measured(np.zeros(7), np.full(5, 1e30), [-3.0], [1e-30]).histogram
    assert histogram.counts.sum() == 14
    assert (histogram.counts[0], histogram.counts[-1]) == (1, 5)


def test_a_far_narrow_distribution_keeps_the_spacing_of_float32() -> None:
    x = np.float32(1000) + np.arange(50, dtype=np.float32) * np.spacing(np.float32(1000))
    histogram = measured(x).histogram
    assert histogram.counts.tolist() == [1] * 50


@pytest.mark.parametrize("bad, what", [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_nan_and_infinity_are_errors(bad: float, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        measured([0.0, bad, 1.0])


def test_an_empty_array_changes_nothing() -> None:
    stats = measured([1.0, 2.0], np.zeros((0, 3)))
    assert (stats.samples, stats.minimum, stats.maximum) == (1, 1.0, 2.0)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize(
    "x",
    [[0.0], [0.0] * 9, [3.0], [-3.0] * 4, [1e-38, -1e-38], [3e38, -3e38], [0.0, 1e-45], [1000.0, 1000.0625]],
    ids=str,
)
def test_extreme_tensors_have_a_finite_range_within_the_extremes(observer: str, x: list[float]) -> None:
    low, high = bounds(observer, x)
    seen = [0.0, *np.asarray(x, np.float32).tolist()]
    assert min(seen) <= low <= high <= max(seen)


@pytest.mark.parametrize("observer", OBSERVERS)
@given(samples=st.lists(arrays(np.float32, 20, elements=tame), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_ranges_lie_within_the_extremes(observer: str, samples: list[Array]) -> None:
    low, high = bounds(observer, *samples)
    x = np.concatenate(samples)
    assert min(float(x.min()), 0.0) <= low <= high <= max(float(x.max()), 0.0)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_one_value_alone(observer: str, value: float) -> None:
    low, high = bounds(observer, np.full(20, value, np.float32))
    assert min(value, 0.0) <= low <= high <= max(value, 0.0)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
def test_order_of_samples_does_not_matter(observer: str) -> None:
    samples = [normal(500, seed) * (seed + 1) for seed in range(5)]
    assert bounds(observer, *samples) == bounds(observer, *samples[::-1])


def test_moving_average_follows_the_extremes_of_samples() -> None:
    config = Calibration(momentum=0.5)
    stats = TensorStats(StreamingHistogram(128), config.momentum)
    for sample in ([-1.0, 1.0], [-3.0, 5.0], [-1.0, 1.0]):
        stats.update(np.asarray(sample, np.float32), with_histogram=False)
    assert OBSERVERS["moving_average"](stats, config, LEVELS) == (-1.5, 2.0)


@given(
    x=arrays(np.float32, st.integers(1, 400), elements=tame),
    percent=st.sampled_from([50.5, 75.0, 90.0, 99.0, 99.9, 99.99, 100.0]),
)
@settings(deadline=None)
def test_percentile_is_numpys_within_one_bin(x: Array, percent: float) -> None:
    stats = measured(x)
    low, high = OBSERVERS["percentile"](stats, Calibration(percentile=percent), LEVELS)
    # The same rank on both sides, counted in integers as the observer does.
    outside = int((x.size - 1) * (100 - percent) / 100)
    ordered = np.sort(x)
    assert 0 <= ordered[outside] - low <= stats.histogram.width
    assert 0 <= high - ordered[x.size - 1 - outside] <= stats.histogram.width
    if percent == 100:
        assert (low, high) == (ordered[0], ordered[-1])


def test_percentile_of_many_values_is_numpys() -> None:
    x = normal(100_000)
    low, high = bounds("percentile", x, config=Calibration(percentile=99.0))
    width = measured(x).histogram.width
    np.testing.assert_allclose([low, high], np.percentile(x, [1, 99]), atol=1.1 * width)


@given(x=arrays(np.float32, 60, elements=tame))
@settings(deadline=None)
def test_mse_is_never_worse_than_minmax(x: Array) -> None:
    stats = measured(x)
    values, counts = stats.histogram.centers, stats.histogram.counts
    low, high = OBSERVERS["mse"](stats, CONFIG, LEVELS)
    widest = min(stats.minimum, 0.0), max(stats.maximum, 0.0)
    if widest == (0.0, 0.0):
        return
    found, full = squared_error(
        np.asarray([low, widest[0]]), np.asarray([high, widest[1]]), values, counts, LEVELS
    )
    assert found <= full * (1 + 1e-12)


def test_mse_clips_a_rare_outlier_at_four_bits_and_keeps_it_at_eight() -> None:
    x = np.append(normal(20_000), np.float32(12))
    stats = measured(x)
    assert OBSERVERS["mse"](stats, CONFIG, 15)[1] < 5
    assert OBSERVERS["mse"](stats, CONFIG, 255)[1] > 8


def test_mse_of_a_uniform_tensor_keeps_it_whole() -> None:
    low, high = bounds("mse", np.random.default_rng(0).uniform(-1, 1, 50_000))
    assert low < -0.98
    assert high > 0.98


def test_squared_error_is_that_of_the_integer_grid() -> None:
    values, counts = np.asarray([-2.0, -0.4, 0.0, 0.3, 3.0]), np.asarray([1, 2, 3, 4, 5])
    low, high, levels = -1.0, 2.0, 15
    step = (high - low) / levels
    grid = (np.arange(levels + 1) - round(-low / step)) * step
    nearest = np.abs(values[:, None] - grid).min(1)
    found = squared_error(np.asarray([low]), np.asarray([high]), values, counts, levels)
    assert found[0] == pytest.approx(float((counts * nearest**2).sum()))


@pytest.mark.parametrize("count", [20_000, 200_000])
@pytest.mark.parametrize("outliers", [[50.0], [-50.0], [50.0, -50.0]])
def test_entropy_cuts_an_outlier_off(count: int, outliers: list[float]) -> None:
    low, high = bounds("entropy", np.append(normal(count), np.asarray(outliers, np.float32)))
    assert 2 < max(-low, high) < 10


@pytest.mark.parametrize("one_sided", [False, True])
def test_entropy_keeps_most_of_a_gaussian(one_sided: bool) -> None:
    x = np.maximum(normal(200_000), 0) if one_sided else normal(200_000)
    low, high = bounds("entropy", x)
    assert 2.5 < high <= x.max()
    assert low == 0 if one_sided else -high == pytest.approx(low, rel=0.2)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_entropy_does_not_take_spikes_for_information(sigma: float) -> None:
    skewed = np.exp(np.random.default_rng(0).normal(0, sigma, 100_000))
    # Constant inputs after a bias give a few values many times.
    stats = measured(np.append(skewed, np.repeat(skewed[:20], 2000)))
    values, counts = stats.histogram.centers, stats.histogram.counts
    ends = [OBSERVERS[name](stats, CONFIG, LEVELS)[1] for name in ("entropy", "mse")]
    entropy, least = squared_error(np.zeros(2), np.asarray(ends), values, counts, LEVELS)
    assert entropy < 8 * least


def test_smoothed_is_the_mean_around_a_bin_and_keeps_the_mass() -> None:
    masses = np.asarray([3.0, 0.0, 0.0, 6.0, 0.0, 0.0, 9.0])
    np.testing.assert_allclose(smoothed(masses, 1), [2, 1, 2, 2, 2, 3, 6])
    np.testing.assert_array_equal(smoothed(masses, 0), masses)
    assert smoothed(masses, 5).sum() == pytest.approx(masses.sum())


def test_entropy_does_not_cut_most_values_off() -> None:
    assert bounds("entropy", [0.5] + [1.0] * 19) == (0.5, 1.0)


def test_zeros_of_a_relu_do_not_move_the_threshold() -> None:
    x = np.abs(normal(100_000))
    few, many = bounds("entropy", x), bounds("entropy", np.append(x, np.zeros(500_000)))
    assert few[1] == many[1]


def test_divergences_are_those_of_the_plain_loop() -> None:
    rng = np.random.default_rng(0)
    masses = rng.poisson(np.exp(-np.arange(700) / 60) * 30).astype(np.float64)
    used = np.asarray([64, 65, 100, 333, 699, 700])
    plain = [plain_divergence(masses, int(n), 64) for n in used]
    np.testing.assert_allclose(divergences(masses, used, 64), plain, rtol=1e-9, atol=1e-12)


def plain_divergence(masses: npt.NDArray[np.float64], used: int, steps: int) -> float:
    """As Migacz describes it; an empty level counts as one value."""
    reference = masses[:used].copy()
    reference[-1] += masses[used:].sum()
    occupied = reference > 0
    level = np.arange(used) * steps // used
    mass = np.bincount(level, masses[:used], steps)
    members = np.bincount(level, occupied, steps)
    spread = np.where(occupied, (mass / np.maximum(members, 1))[level], 0)
    spread[occupied & (spread == 0)] = 1
    p, q = reference[occupied] / reference.sum(), spread[occupied] / spread.sum()
    return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("observer", ["entropy", "mse", "percentile"])
def test_observers_are_fast(observer: str) -> None:
    stats = measured(normal(100_000))
    took = []
    for _ in range(5):
        started = time.thread_time()
        OBSERVERS[observer](stats, CONFIG, LEVELS)
        took.append(time.thread_time() - started)
    assert min(took) < 0.03
