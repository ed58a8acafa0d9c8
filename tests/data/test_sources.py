import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.counting import calls_of
from support.sampling import (
    F4,
    IDS,
    MASK,
    PICTURE,
    ROW,
    X,
    image_folder,
    module,
    npy_folder,
    npz,
    opened,
    values,
)

from edgepack.config.recipe import ImageInput, Labels
from edgepack.data.samples import check_disjoint
from edgepack.errors import ConfigError, EdgepackError, SamplesError
from edgepack.ir.inputs import InputSpec

# ---- images


def test_images_without_preprocessing_get_the_lines_to_add(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "p", "a.png")
    with pytest.raises(
        ConfigError, match=r"images:\n  'picture': \{height: 8, width: 6, mean: 0, std: 255\}"
    ):
        opened(folder, PICTURE)
    last = InputSpec("input.1", np.dtype(np.uint8), ("n", "h", 6, 1))
    with pytest.raises(
        ConfigError,
        match=r"'input.1': \{height: PIXELS, width: 6, mean: 0, std: 1, color: gray, layout: nhwc\}",
    ):
        opened(folder, last)


def test_image_folders_feed_one_input(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "p", "a.png")
    images = {"picture": ImageInput()}
    with pytest.raises(SamplesError, match=r"has 2 \('picture', 'x'\); give .npz files .*`module:function`"):
        opened(folder, PICTURE, X, images=images)
    with pytest.raises(SamplesError, match="feeds one input"):
        opened(npy_folder(tmp_path / "n", ROW), IDS, MASK)
    with pytest.raises(ConfigError, match=r"images\.picturs: .*did you mean 'picture'\?"):
        opened(folder, PICTURE, images={"picturs": ImageInput()})
    with pytest.raises(ConfigError, match=r"images\.picture: mean has 2 values"):
        opened(folder, PICTURE, images={"picture": ImageInput(mean=(1, 2))})
    with pytest.raises(
        SamplesError, match=r"sample 0 \(p/a\.png\): input 'picture' .* axis 3 must be 6, it is 9"
    ):
        opened(folder, PICTURE, images={"picture": ImageInput(width=9, height=8)})


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "p", "a.png", "b.png")
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:45])
    samples = opened(folder, PICTURE, images={"picture": ImageInput()})
    with pytest.raises(SamplesError, match=r"sample 1: .*b\.png: is not a readable image"):
        list(samples)


# ---- functions


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        (
            "data_raises",
            "yield {'x': np.zeros((3, 4), 'f4')}\n1 / 0",
            "raised ZeroDivisionError for sample 1",
        ),
        ("data_none", "return []", "data_none:samples: yields no samples"),
        ("data_null", "pass", "raised TypeError"),
        ("data_arrays", "yield np.zeros(3)", r"\[0\]: yielded ndarray; yield \{input name: array\}"),
        ("data_some", "yield {}, 1\nyield {}", r"\[1\]: some samples have a label and some have none"),
        ("data_label", "yield {}, {1}", r"\[0\]: a label is a set"),
        ("data_nan", "yield {}, np.float32('nan')", r"\[0\]: the label is nan"),
    ],
)
def test_functions_that_misbehave(tmp_path: Path, name: str, body: str, message: str) -> None:
    with pytest.raises(SamplesError, match=message):
        opened(module(tmp_path, name, body), X, base=tmp_path)


def test_functions_that_change_between_calls(tmp_path: Path) -> None:
    (tmp_path / "data_once.py").write_text(
        "import numpy as np\nitems = iter([{'x': np.zeros((3, 4), 'f4')}] * 3)\n"
        "def samples():\n    return items\n"
    )
    with pytest.raises(SamplesError, match="ended before sample 0, which an earlier call gave"):
        opened("data_once:samples", X, base=tmp_path)
    (tmp_path / "data_moves.py").write_text(
        "import itertools\nimport numpy as np\ncount = itertools.count()\n"
        "def samples():\n    yield {'x': np.zeros((3, 4), 'f4')}, next(count)\n"
    )
    with pytest.raises(SamplesError, match=r"had the label 0 and now has 1; .* fix its seed"):
        opened("data_moves:samples", X, base=tmp_path)


def test_a_function_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepack.data.sources.MAX_FUNCTION_SAMPLES", 10)
    with pytest.raises(SamplesError, match="yields more than 10 samples; does it ever end"):
        opened(module(tmp_path, "data_endless", "while True: yield {}"), X, base=tmp_path)


# ---- labels


def test_labels_from_file_names(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "p", "0042.png", "0007.png")
    images = {"picture": ImageInput()}
    assert opened(folder, PICTURE, images=images, labels=Labels(filename=r"(\d+)")).labels == [7, 42]
    image_folder(folder, "cat_1.png")
    found = opened(folder, PICTURE, images=images, labels=Labels(filename=r"^(\w+?)[_.]"))
    assert found.labels == ["0007", "0042", "cat"]
    with pytest.raises(
        SamplesError, match=r"cat_1\.png: sample 2: labels\.filename .* finds no label in 'cat_1"
    ):
        opened(folder, PICTURE, images=images, labels=Labels(filename=r"(\d{4})"))
    for pattern, message in ((r"\d+", "has 0 groups"), ("(", "is not a regular expression")):
        with pytest.raises(ConfigError, match=message):
            opened(folder, PICTURE, images=images, labels=Labels(filename=pattern))


def table_labels(tmp_path: Path, text: str) -> Any:
    folder = npy_folder(tmp_path / "n", ROW, ROW + 1)
    (tmp_path / "labels.tsv").write_text(text, encoding="utf-8")
    return opened(folder, X, labels=Labels(file=tmp_path / "labels.tsv")).labels


def test_labels_from_a_table(tmp_path: Path) -> None:
    assert table_labels(tmp_path, "001.npy\t two  words \n000.npy\tü\u2028\n") == ["ü\u2028", " two  words "]
    assert table_labels(tmp_path, "000\t1\t0.5\n001\t2\t0.1\n000\t3\t\n") == [
        (("1", "0.5"), ("3", "")),
        (("2", "0.1"),),
    ]
    assert table_labels(tmp_path, "000\ta\n000\tb\n001\n") == [(("a",), ("b",)), ()]


def test_tables_that_lack_a_sample_or_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        SamplesError, match=r"labels\.tsv: no line for sample 1 \(.*001\.npy\); begin a line with"
    ):
        table_labels(tmp_path, "000\ta\n0010\tb\n")
    with pytest.raises(SamplesError, match=r"none\.tsv: labels\.file cannot be read"):
        opened(tmp_path / "n", X, labels=Labels(file=tmp_path / "none.tsv"))


def test_labels_of_the_wrong_kind(tmp_path: Path) -> None:
    stack = npz(tmp_path / "a.npz", x=np.stack([ROW]), y=np.zeros((1, 2, 2)), bad=np.array([np.inf]))
    assert opened(stack, X, labels=Labels(array="y")).labels == [((0.0, 0.0), (0.0, 0.0))]
    cases: list[tuple[Path | str, Labels, type[EdgepackError], str]] = [
        (
            stack,
            Labels(array="z"),
            SamplesError,
            r"a\.npz: has no array 'z' \(labels\.array\); it has bad, x, y",
        ),
        (stack, Labels(array="bad"), SamplesError, r"array 'bad'\[0\]: the label is inf"),
        (stack, Labels(filename="(a)"), ConfigError, "labels of stacked samples can only be an array"),
        (npy_folder(tmp_path / "n", ROW), Labels(array="y"), ConfigError, r"labels\.array needs \.npz files"),
        ("data_ok:samples", Labels(array="y"), ConfigError, r"yields \(feeds, label\) itself"),
    ]
    for path, labels, kind, message in cases:
        with pytest.raises(kind, match=message):
            opened(path, X, base=tmp_path, labels=labels)


# ---- fingerprints and overlap


def test_fingerprints_follow_the_content_not_the_container(tmp_path: Path) -> None:
    rows = np.stack([ROW + i for i in range(4)])
    np.save(tmp_path / "a.npy", rows)
    folder = npy_folder(tmp_path / "n", *rows)
    first = opened(tmp_path / "a.npy", X).fingerprint
    assert first == opened(folder, X).fingerprint == opened(npz(tmp_path / "a.npz", x=rows), X).fingerprint
    assert first != opened(folder, X, samples=3).fingerprint
    np.save(folder / "003.npy", rows[3] + 1)
    assert first != opened(folder, X).fingerprint


def test_fingerprints_of_images_follow_the_preprocessing(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "p", "a.png", "b.png")
    prints = {
        opened(folder, PICTURE, images={"picture": ImageInput(std=std)}).fingerprint for std in (1, 2, 2)
    }
    assert len(prints) == 2


def test_shared_samples_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.stack([ROW + i for i in range(6)]))
    calibration = opened(tmp_path / "a.npy", X)
    check_disjoint(calibration, opened(npy_folder(tmp_path / "far", ROW + 50), X))
    near = npy_folder(tmp_path / "near", ROW + 90, ROW + 5, ROW + 1, ROW + 2, ROW + 3)
    with pytest.raises(
        SamplesError, match=r"4 evaluation samples .*\(a\.npy\[5\] = near/001\.npy, .* and 1 more"
    ):
        check_disjoint(calibration, opened(near, X))


def test_shared_image_files_are_refused_whatever_their_names(tmp_path: Path) -> None:
    images = {"picture": ImageInput()}
    calibration = opened(image_folder(tmp_path / "c", "a.png", "b.png"), PICTURE, images=images)
    others = image_folder(tmp_path / "e", "a.png", "z.png", first=2)
    check_disjoint(calibration, opened(others, PICTURE, images=images))
    (others / "y.png").write_bytes((tmp_path / "c" / "b.png").read_bytes())
    with pytest.raises(SamplesError, match=r"^1 evaluation samples are also .*\(c/b\.png = e/y\.png;"):
        check_disjoint(calibration, opened(others, PICTURE, images=images))
    array = np.full((1, 3, 8, 6), 1, np.float32)  # the decoded b.png
    with pytest.raises(SamplesError, match=r"c/b\.png = a\.npz\[0\]"):
        check_disjoint(calibration, opened(npz(tmp_path / "a.npz", picture=array), PICTURE))


class CountedDigest(bytes):
    """A digest whose comparisons are Python calls, so that they can be counted."""

    def __eq__(self, other: object) -> bool:
        return bytes.__eq__(self, other) is True

    __hash__ = bytes.__hash__


class CountedSha256:
    """SHA-256 that gives such digests."""

    def __init__(self, data: bytes = b"") -> None:
        self.update, self._whole = (whole := SHA256(data)).update, whole

    def digest(self) -> bytes:
        return CountedDigest(self._whole.digest())


SHA256 = hashlib.sha256


def test_samples_are_read_and_compared_in_linear_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the samples in both splits are twice the work; a pairwise comparison would be four times."""
    monkeypatch.setattr(hashlib, "sha256", CountedSha256)
    spec = InputSpec("dense", F4, ("batch", 22))

    def work(used: int, evaluated: int) -> int:
        dense, ids = (
            np.arange(22 * (used + evaluated), dtype=F4).reshape(-1, 22),
            np.zeros((evaluated, 3), int),
        )
        first = opened(npz(tmp_path / "a.npz", dense=dense[:used], ids=ids[:used]), spec, IDS)
        second = opened(npz(tmp_path / "b.npz", dense=dense[used:], ids=ids), spec, IDS)
        return calls_of(lambda: check_disjoint(first, second))

    few = work(500, 1000)
    assert few > 1500  # each sample is read
    assert work(1000, 2000) < 2.2 * few


def test_batches_do_not_hide_shared_samples(tmp_path: Path) -> None:
    """A function may yield batches: their rows are compared, not the batches."""
    rows = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
    batches = module(tmp_path, "batches", "yield {'x': np.arange(36, dtype='f4').reshape(3, 3, 4)}")
    calibration = opened(batches, X, base=tmp_path)
    assert [sample.feeds["x"].shape for sample in calibration] == [(3, 3, 4)]
    check_disjoint(calibration, opened(npz(tmp_path / "other.npz", x=rows[3:]), X))
    with pytest.raises(SamplesError, match=r"1 evaluation samples are also calibration samples"):
        check_disjoint(calibration, opened(npz(tmp_path / "evaluation.npz", x=rows[2:]), X))


def test_stacks_in_a_folder_are_split(tmp_path: Path) -> None:
    rows = np.arange(96, dtype=np.float32).reshape(8, 3, 4)
    folder = tmp_path / "both"
    folder.mkdir()
    npz(folder / "a.npz", x=rows[:3], label=np.arange(3))
    npz(folder / "b.npz", x=rows[3:4], label=np.arange(3, 4))
    npz(folder / "c.npz", x=rows[4:], label=np.arange(4, 8))
    samples = opened(folder, X, labels=Labels(array="label"))
    assert samples.origin.keys == ("a.npz[0]", "a.npz[1]", "a.npz[2]", "b.npz[0]", *samples.origin.keys[4:])
    assert values(samples) == rows[:, 0, 0].tolist()
    assert samples.labels == list(range(8))
    assert values(opened(folder, X, samples=3)) == rows[[0, 2, 5], 0, 0].tolist()
    assert samples.fingerprint == opened(npz(tmp_path / "all.npz", x=rows), X).fingerprint
    with pytest.raises(SamplesError, match=r"4 evaluation samples are also .*\(c\.npz\[0\] = c\.npz\[0\]"):
        check_disjoint(samples, opened(folder / "c.npz", X))
    with pytest.raises(ConfigError, match=r"stacked samples can only be an array"):
        opened(folder, X, labels=Labels(filename="(a|b|c)"))


@pytest.mark.parametrize(
    ("shape", "apart"),
    [
        (("batch", 3, 4), True),
        (("batch_size", None, 4), True),
        ((None, 3, 8, 6), True),  # no name, but images
        (("unk__5", 3, 8, 6), True),
        ((None, 4), False),  # may be time or points, whose entries belong together
        (("time", 4), False),
        (("frames", 3, 8, 6), False),
        ((5, 4), False),
    ],
)
def test_only_a_certain_batch_axis_is_split(shape: Any, apart: bool, tmp_path: Path) -> None:
    sizes = [5, *(d if isinstance(d, int) else 2 for d in shape[1:])]
    samples = opened(npy_folder(tmp_path / "f", np.ones(sizes, F4)), InputSpec("x", F4, shape))
    assert [s.feeds["x"].shape[0] for s in samples] == ([1] * 5 if apart else [5])


def test_samples_without_the_batch_axis_are_no_stacks(tmp_path: Path) -> None:
    samples = opened(npy_folder(tmp_path / "f", ROW, ROW + 1), X)
    assert values(samples) == [0, 1]
    state = InputSpec("state", F4, (2, "batch", 3))
    folder = tmp_path / "states"
    folder.mkdir()
    npz(folder / "0.npz", x=np.ones((2, 3, 4), F4), state=np.ones((2, 2, 3), F4))
    assert [s.feeds["x"].shape for s in opened(folder, X, state)] == [(2, 3, 4)]
