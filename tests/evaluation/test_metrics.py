from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.data.labels import Label
from edgepack.errors import ConfigError, EdgepackError, SamplesError
from edgepack.evaluation.metrics import Outputs, auc, resolve_metric, top1


def outputs(*rows: Any) -> Outputs:
    return [{"scores": np.array(row, np.float32)} for row in rows]


def write_module(folder: Path, name: str, text: str) -> Path:
    (folder / f"{name}.py").write_text(text)
    return folder


def test_top1_counts_the_argmax_of_the_first_output() -> None:
    results = [{**o, "other": np.zeros(3)} for o in outputs([[0, 2, 1]], [[5, 2, 1]], [3, 4, 9])]
    for name in ("top1", "accuracy"):
        assert resolve_metric(name, Path())(results, [1, 1, 2]) == pytest.approx(2 / 3)
    assert top1(results, [1.0, 0.0, 2.0]) == 1.0


@pytest.mark.parametrize(
    ("output", "label", "message"),
    [
        ([[1, 2], [3, 4]], 0, r"'scores' of sample 1 has shape \[2, 2\]"),
        (3.0, 0, r"'scores' of sample 1 has shape \[\]"),
        ([[1, 2]], "cat", "label of sample 1 is 'cat', not a class number"),
        ([[1, 2]], 0.5, "label of sample 1 is 0.5"),
        ([[1, np.nan]], 0, "'scores' of sample 1 holds NaN"),
    ],
)
def test_top1_refuses_what_it_cannot_score(output: Any, label: Label, message: str) -> None:
    with pytest.raises(SamplesError, match=message):
        resolve_metric("top1", Path())(outputs([[1, 2]], output), [0, label])


scored = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40)


@given(scored.filter(lambda rows: len({positive for _, positive in rows}) == 2))
def test_auc_is_the_share_of_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    high = [score for score, positive in rows if positive]
    low = [score for score, positive in rows if not positive]
    pairs = [(p > n) + 0.5 * (p == n) for p in high for n in low]
    got = auc(outputs(*([[score]] for score, _ in rows)), [int(positive) for _, positive in rows])
    assert got == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_auc_of_two_values_orders_by_their_difference() -> None:
    results = outputs([[3, 1]], [[0, 1]], [[5, 9]])
    assert resolve_metric("auc", Path())(results, [0, 0, 1]) == 1.0
    assert auc(results, [1, 0, 0]) == 0.0


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (([1], [2]), [0, 2], "label of sample 1 is 2, not 0 or 1"),
        (([1], [2]), [0, "1"], "label of sample 1 is '1'"),
        (([1], [2]), [1, 1], "2 samples are labelled 1 and 0 are 0"),
        (([1], [1, 2, 3]), [0, 1], r"'scores' of sample 1 has shape \[3\]"),
        (([1], [np.nan]), [0, 1], "'scores' of sample 1 holds NaN"),
    ],
)
def test_auc_refuses_what_it_cannot_score(rows: Any, labels: list[Label], message: str) -> None:
    with pytest.raises(SamplesError, match=message):
        auc(outputs(*rows), labels)


def test_unknown_names_suggest_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no 'top_1', did you mean 'top1'\?"):
        resolve_metric("top_1", Path())


def test_missing_labels_say_how_to_give_them() -> None:
    with pytest.raises(
        SamplesError, match=r"no labels; add one of labels\.array, labels\.filename or labels\.file"
    ):
        resolve_metric("auc", Path())(outputs([1]), None)
    with pytest.raises(SamplesError, match="1 outputs and 2 labels"):
        resolve_metric("auc", Path())(outputs([1]), [0, 1])


def test_a_function_of_the_user(tmp_path: Path) -> None:
    base = write_module(
        tmp_path, "metric_ok", "def score(outputs, labels):\n    return len(outputs) + labels[0]\n"
    )
    metric = resolve_metric("metric_ok:score", base)
    assert metric.name == "metric_ok:score"
    assert metric(outputs([1], [2]), [40, 0]) == 42.0


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("metric_raises", "return outputs['x']", "metric_raises:score: raised TypeError"),
        ("metric_nan", "return float('nan')", "metric_nan:score: gave nan for 1 samples"),
        ("metric_text", "return 'high'", "metric_text:score: raised ValueError"),
    ],
)
def test_functions_that_fail(tmp_path: Path, name: str, body: str, message: str) -> None:
    base = write_module(tmp_path, name, f"def score(outputs, labels):\n    {body}\n")
    with pytest.raises(EdgepackError, match=message) as raised:
        resolve_metric(f"{name}:score", base)(outputs([1]), [0])
    assert ("raised" in message) == (raised.value.__cause__ is not None)


def test_functions_that_cannot_be_loaded(tmp_path: Path) -> None:
    write_module(tmp_path, "metric_names", "def score(outputs, labels): ...\nlimit = 3\n")
    write_module(tmp_path, "metric_broken", "import no_such_thing_at_all\n")
    for reference, message in {
        "metric_names:scor": r"'scor' is not in metric_names, did you mean 'score'\?",
        "metric_names:limit": "'limit' is not a function",
        "metric_broken:score": "failed with ModuleNotFoundError: No module named 'no_such_thing_at_all'",
        "metric_absent:score": "No module named 'metric_absent'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            resolve_metric(reference, tmp_path)


def test_another_module_of_the_same_name_is_not_used_silently(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, value in ((first, 1), (second, 2)):
        folder.mkdir()
        write_module(folder, "metric_twice", f"def score(outputs, labels):\n    return {value}\n")
    assert resolve_metric("metric_twice:score", first)(outputs([1]), [0]) == 1
    with pytest.raises(ConfigError, match="another module named 'metric_twice' is already loaded from"):
        resolve_metric("metric_twice:score", second)
