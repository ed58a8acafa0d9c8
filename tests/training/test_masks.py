"""Choices of masks: exact counts, the least leave, the largest gradients come back, all else stays."""

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `tune`")

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgepack.training.masks import PATTERNS, Past, joined, lamp, lowest, patterned, unstructured

SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 11)), min_size=1, max_size=3)
SHARES = st.floats(0.01, 0.99)
quick = settings(deadline=None, max_examples=150)


def drawn(shapes: list[tuple[int, int]], seed: int) -> dict[str, Tensor]:
    """Weights, some of which are equal and some zero."""
    torch.manual_seed(seed)
    return {f"w{i}": (torch.randn(shape) * 4).round() / 4 for i, shape in enumerate(shapes)}


def past_of(weights: dict[str, Tensor], out: float, exchanged: float) -> Past:
    size = sum(w.numel() for w in weights.values())
    return Past(torch.rand(size) < out, (torch.randn(size) * 4).round() / 4, exchanged)


@quick
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.data())
def test_the_lowest_are_as_many_as_asked_for(numbers: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(numbers)))
    found = lowest(torch.tensor(numbers, dtype=torch.float32), count).tolist()
    order = sorted(range(len(numbers)), key=lambda i: (numbers[i], i))
    assert [i for i, is_in in enumerate(found) if is_in] == sorted(order[:count])


@quick
@given(SHAPES, SHARES, st.integers(0, 99))
def test_of_all_weights_the_least_are_out(shapes: list[tuple[int, int]], sparsity: float, seed: int) -> None:
    weights = drawn(shapes, seed)
    masks = unstructured(weights, sparsity)
    assert all(masks[key].shape == w.shape for key, w in weights.items())
    mask, scores = joined(masks), joined({key: lamp(w) for key, w in weights.items()})
    assert set(mask.tolist()) <= {0.0, 1.0}
    assert int((mask == 0).sum()) == round(sparsity * len(mask))
    if 0 < mask.sum() < len(mask):
        assert scores[mask == 0].max() <= scores[mask == 1].min()


@quick
@given(SHAPES, SHARES, st.floats(0, 1), st.floats(0, 0.99), st.integers(0, 99))
def test_the_largest_gradients_come_back_for_the_least_weights(
    shapes: list[tuple[int, int]], sparsity: float, out: float, exchanged: float, seed: int
) -> None:
    weights = drawn(shapes, seed)
    past = past_of(weights, out, exchanged)
    is_in = joined(unstructured(weights, sparsity, past)) == 1
    scores, gradients = joined({key: lamp(w) for key, w in weights.items()}), past.gradients.abs()
    size, before = len(is_in), int(past.out.sum())
    zeros = max(round(sparsity * size), before)
    assert int((~is_in).sum()) == zeros
    back, still_out = past.out & is_in, past.out & ~is_in
    assert int(back.sum()) == min(round(exchanged * (size - zeros)), before, size - zeros)
    if back.any() and still_out.any():
        assert gradients[back].min() >= gradients[still_out].max()
    left, stayed = ~past.out & ~is_in, ~past.out & is_in
    if left.any() and stayed.any():
        assert scores[left].max() <= scores[stayed].min()


@quick
@given(SHAPES, st.floats(0, 1), st.sampled_from(sorted(PATTERNS)), st.integers(0, 99))
def test_a_share_of_the_groups_follows_a_pattern(
    shapes: list[tuple[int, int]], share: float, pattern: str, seed: int
) -> None:
    kept, of = PATTERNS[pattern]
    rows = drawn(shapes, seed)
    masks = patterned(rows, share, pattern)
    costs: dict[bool, list[float]] = {True: [], False: []}
    for key, mask in masks.items():
        whole = mask.shape[1] // of * of
        assert mask[:, whole:].all(), "inputs that fill no group stay"
        groups = mask[:, :whole].reshape(-1, of)
        scores = lamp(rows[key])[:, :whole].reshape(-1, of)
        for group, score in zip(groups, scores, strict=True):
            follows = not group.all()
            least = score.sort().values[: of - kept]
            costs[follows].append(float(least.sum()))
            if follows:
                assert int((group == 0).sum()) == of - kept
                assert torch.equal(score[group == 0].sort().values, least)
    assert len(costs[True]) == round(share * sum(map(len, costs.values())))
    if costs[True] and costs[False]:
        assert max(costs[True]) <= min(costs[False]) + 1e-6, "what loses least follows first"


@quick
@given(SHAPES, st.floats(0.2, 0.8), st.sampled_from(sorted(PATTERNS)), st.integers(0, 99))
def test_in_a_pattern_weights_are_exchanged_within_groups(
    shapes: list[tuple[int, int]], share: float, pattern: str, seed: int
) -> None:
    _, of = PATTERNS[pattern]
    rows = drawn(shapes, seed)
    first = joined(patterned(rows, share, pattern)) == 0
    past = Past(first, torch.randn(len(first)), 0.3)
    after = patterned(rows, min(1.0, share + 0.2), pattern, past)
    is_in = joined(after) == 1
    back = first & is_in
    size, before = len(first), int(first.sum())
    assert int(back.sum()) == min(round(0.3 * (size - before)), before)
    if back.any() and (first & ~is_in).any():
        assert past.gradients.abs()[back].min() >= past.gradients.abs()[first & ~is_in].max()
    for key, old in patterned(rows, share, pattern).items():
        whole = old.shape[1] // of * of
        old_groups, groups = (m[:, :whole].reshape(-1, of) for m in (old, after[key]))
        followed = ~old_groups.all(1)
        assert torch.equal(groups[followed].sum(1), old_groups[followed].sum(1)), "groups go on to follow"
