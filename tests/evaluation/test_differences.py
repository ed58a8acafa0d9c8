"""Differences of numeric and discrete outputs, and of rows in any order and number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.onnx_models import Array, f32, i64

from edgepack.errors import ExportError
from edgepack.evaluation.check import Comparison
from edgepack.evaluation.differences import (
    compared_outputs,
    data_dependent_axes,
    discrete_row_difference,
    numeric_row_difference,
    open_axis,
)
from edgepack.evaluation.variation import varying_power

BOXES = f32([[0, 0, 10, 10], [20, 20, 30, 40], [5, 50, 25, 70]])


def compared(expected: Array, got: Array, **more: tuple[Array, Array]) -> Comparison:
    found = Comparison()
    found.add(
        {"y": expected, **{n: a for n, (a, _) in more.items()}},
        {"y": got, **{n: b for n, (_, b) in more.items()}},
        "probe 0",
    )
    return found


def test_integer_classes_alone_are_discrete() -> None:
    """A model that ends with an ArgMax is compared too: its outputs are not equal only for being integers."""
    classes = i64(np.arange(100).reshape(1, 10, 10) % 7)
    other = classes.copy()
    other[0, 0, :5] = 9
    found = compared(classes, other)
    assert found.agreement == pytest.approx(0.95)
    assert found.sqnr_db == pytest.approx(10 * np.log10(100 / 5))
    assert compared(classes, classes).sqnr_db == np.inf


def test_images_alone_are_numeric() -> None:
    picture = np.full((1, 3, 8, 8), 100, np.uint8)
    found = compared(picture, picture + np.uint8(1))
    assert found.sqnr_db == pytest.approx(40)


def test_discrete_outputs_beside_numeric_ones_do_not_count() -> None:
    found = compared(f32([[1, 2]]), f32([[1, 2]]), classes=(i64([3]), i64([4])))
    assert found.sqnr_db == np.inf
    assert compared_outputs({"y": f32([1]), "n": i64([1])}) == (["y"], True)
    assert compared_outputs({"m": np.asarray([True]), "n": i64([1])}) == (["m", "n"], False)


@given(st.permutations(range(3)), st.integers(0, 3))
def test_boxes_in_another_order_or_number(order: list[int], missing: int) -> None:
    """Boxes are compared, not their position in the list."""
    moved = BOXES[order] + np.float32(0.01)
    assert numeric_row_difference(BOXES, moved).noise == pytest.approx(12 * 0.01**2, rel=1e-2)
    fewer = numeric_row_difference(BOXES, BOXES[order][missing:])
    assert fewer.signal == pytest.approx(float((BOXES**2).sum()))
    assert (fewer.noise == 0) == (missing == 0)
    assert numeric_row_difference(BOXES[order][missing:], BOXES).noise > 0 or missing == 0


def test_one_box_more_does_not_end_the_comparison() -> None:
    more = np.vstack([BOXES[::-1], BOXES[:1] + 0.5])
    found = compared(
        BOXES, more, picked=(i64([[0, 0], [0, 1], [0, 2]]), i64([[0, 2], [0, 1], [0, 0], [0, 3]]))
    )
    assert 20 < found.sqnr_db < 60
    again = Comparison(open_axes=found.open_axes)
    again.add({"y": BOXES}, {"y": BOXES[::-1]}, "probe 1")
    assert again.sqnr_db == np.inf, "once its number followed from data, order means nothing"
    nothing = compared(BOXES, BOXES[:0])
    assert nothing.sqnr_db == pytest.approx(0)


def test_discrete_rows() -> None:
    a, b = i64([[0, 1], [0, 2], [0, 2]]), i64([[0, 2], [0, 1]])
    found = discrete_row_difference(a, b)
    assert (found.signal, found.noise) == (3, 1)
    assert compared(a, b).agreement == pytest.approx(2 / 3)


def test_what_varies_in_outputs_without_floats() -> None:
    classes = [{"y": i64([[1, 2, 3]])}, {"y": i64([[1, 2, 3]])}]
    assert varying_power(classes) == 6
    pictures = [{"y": np.full((1, 4), level, np.uint8)} for level in (10, 20)]
    assert varying_power(pictures) == pytest.approx(2 * 4 * 50)


def test_data_dependent_sizes() -> None:
    """Found in the original's runs: inputs of equal shapes with different numbers of rows."""
    x, wide = {"x": np.zeros((1, 4))}, {"x": np.zeros((1, 8))}
    mask = {"m": np.zeros((2, 9))}
    runs = [(x, {"y": BOXES, **mask}), (wide, {"y": BOXES[:1], **mask}), (x, {"y": BOXES[:2], **mask})]
    assert data_dependent_axes(runs) == {"y": 0}
    assert data_dependent_axes(runs[:2]) == {}, "of another input"


def test_an_output_of_another_shape_is_an_error() -> None:
    assert open_axis(BOXES, BOXES[:, :2]) == 1
    for other in (BOXES[:2, :2], BOXES[None]):
        with pytest.raises(ExportError, match=r"output 'y' on sample probe 0: shape"):
            compared(BOXES, other)


def test_infinity_where_the_original_has_none() -> None:
    with pytest.raises(ExportError, match="NaN or infinity"):
        compared(BOXES, np.where(BOXES > 60, np.inf, BOXES))
    with pytest.raises(ExportError, match="NaN or infinity"):
        compared(BOXES, np.full((2, 4), np.nan, np.float32))
    masked = np.where(BOXES > 60, -np.inf, BOXES).astype(np.float32)
    assert compared(masked, masked).sqnr_db == np.inf
