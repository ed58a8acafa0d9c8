"""What training reads in a step: which samples can be run at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `tune`")

from support.onnx_models import Array, conv_net, f32, parse
from support.tuning import random_pictures

from edgepack.training.distillation_data import can_be_stacked
from edgepack.training.graph import compile_model, run_program


def test_samples_are_stacked_only_where_that_changes_nothing(tmp_path: Path) -> None:
    feeds = [s.feeds for s in random_pictures(tmp_path)][:2]
    program = compile_model(conv_net())
    assert can_be_stacked(lambda f: run_program(program, f), feeds)
    body = """net (float[a, 3, 8, 8] x) => (float[a, 3, 8, 8] y) { y = Softmax <axis = 0> (x) }"""
    across = compile_model(parse(body))
    assert not can_be_stacked(lambda f: run_program(across, f), feeds)


@pytest.mark.parametrize(
    ("body", "feeds"),
    [
        # A size that the graph fixes: the operator fails.
        (
            "net (float[a, 4] x, int64[2] s) => (float[b, c] y) { y = Reshape (x, s) }",
            [{"x": f32(np.ones((1, 4))), "s": np.asarray([1, 4])} for _ in range(2)],
        ),
        # A condition that is one bool for each sample.
        (
            """net (bool[a] c, float[a, 4] x) => (float[b, 4] y) {
                y = If (c) <then_branch = one () => (float[b, 4] t) { t = Abs (x) },
                            else_branch = two () => (float[b, 4] e) { e = Neg (x) }>
            }""",
            [{"c": np.asarray([True]), "x": f32(np.ones((1, 4)))} for _ in range(2)],
        ),
        # Scalars have no axis to stack along.
        (
            "net (float x) => (float y) { y = Abs (x) }",
            [{"x": np.asarray(i, np.float32)} for i in range(2)],
        ),
        # Teacher outputs of different shapes cannot be stacked either.
        (
            "net (float[a, 4] x) => (int64[2, n] y) { y = NonZero (x) }",
            [{"x": f32([[1, 0, 0, 0]])}, {"x": f32([[1, 1, 0, 0]])}],
        ),
    ],
)
def test_what_does_not_run_as_a_stack_is_not_stacked(body: str, feeds: list[dict[str, Array]]) -> None:
    program = compile_model(parse(body))
    assert not can_be_stacked(lambda f: run_program(program, f), feeds)


@pytest.mark.parametrize("defect", [AttributeError, TypeError, KeyError, MemoryError])
def test_a_defect_is_not_taken_for_a_shape_that_does_not_fit(defect: type[Exception]) -> None:
    def fails(feeds: Mapping[str, Any]) -> dict[str, Any]:
        if len(feeds["x"]) > 1:
            raise defect("a defect")
        return {"y": feeds["x"]}

    with pytest.raises(defect, match="a defect"):
        can_be_stacked(fails, [{"x": f32(np.ones((1, 4)))} for _ in range(2)])
