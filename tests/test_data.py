import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgepack.config import Data, ImageInput, Labels
from edgepack.data import InputSpec, Samples, check_disjoint, open_samples
from edgepack.errors import ConfigError, EdgepackError, SamplesError

F4, I8 = np.dtype(np.float32), np.dtype(np.int64)
X = InputSpec("x", F4, ("batch", 3, 4))
IDS = InputSpec("ids", I8, ("batch", "seq"))
MASK = InputSpec("mask", I8, ("batch", "seq"))
PICTURE = InputSpec("picture", F4, ("batch", 3, 8, 6))
ROW = np.arange(12, dtype=np.float32).reshape(3, 4)


def opened(path: Path | str, *inputs: InputSpec, **more: Any) -> Samples:
    base, images = more.pop("base", Path()), more.pop("images", {})
    return open_samples(Data(path=str(path), **more), "calibration", inputs, images, base=base)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def npy_folder(folder: Path, *arrays: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for index, array in enumerate(arrays):
        np.save(folder / f"{index:03}.npy", array)
    return folder


def image_folder(folder: Path, *names: str, first: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(names, first):
        Image.fromarray(np.full((8, 6, 3), index, np.uint8)).save(folder / name)
    return folder


def module(folder: Path, name: str, body: str) -> str:
    text = "import numpy as np\ndef samples():\n" + "".join(f"    {line}\n" for line in body.split("\n"))
    (folder / f"{name}.py").write_text(text)
    return f"{name}:samples"


def values(samples: Samples, name: str = "x") -> list[float]:
    return [float(s.feeds[name].ravel()[0]) for s in samples]


# ---- sources


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_stacked_npz(tmp_path: Path, save: Callable[..., None], order: Any) -> None:
    ids = np.arange(20).reshape(5, 4)
    save(
        tmp_path / "calib.npz",
        ids=np.array(ids, order=order),
        mask=np.ones((5, 4), np.int32),
        label=np.arange(5, dtype=np.int64),
        unrelated=np.array("note"),
    )
    samples = opened(tmp_path / "calib.npz", MASK, IDS, labels=Labels(array="label"))
    assert len(samples) == 5 and samples.labels == [0, 1, 2, 3, 4]
    for _ in range(2):
        for index, sample in enumerate(samples):
            assert sample.key == f"calib.npz[{index}]" and sample.label == index
            assert list(sample.feeds) == ["mask", "ids"]
            np.testing.assert_array_equal(sample.feeds["ids"], ids[index : index + 1])
            assert sample.feeds["mask"].dtype == np.int64
    assert opened(tmp_path / "calib.npz", MASK, IDS).labels is None


def test_a_stack_may_hold_the_batch_axis_scalars_and_unknown_ranks(tmp_path: Path) -> None:
    path = npz(
        tmp_path / "a.npz", state=np.zeros((4, 2, 1, 3), "f4"), rate=np.arange(4), any=np.ones((4, 5), "f4")
    )
    state, rate = InputSpec("state", F4, (2, "batch", 3)), InputSpec("rate", I8, ())
    samples = list(opened(path, state, rate, InputSpec("any", F4, None)))
    assert samples[3].feeds["state"].shape == (2, 1, 3)
    assert samples[3].feeds["rate"].shape == () and samples[3].feeds["rate"] == 3
    assert samples[3].feeds["any"].shape == (1, 5)


def test_stacked_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "calib.npy", np.stack([ROW + i for i in range(7)]))
    samples = opened(tmp_path / "calib.npy", X)
    assert values(samples) == [0, 1, 2, 3, 4, 5, 6]
    assert next(iter(samples)).feeds["x"].shape == (1, 3, 4)


def test_folder_of_npz_with_varying_shapes(tmp_path: Path) -> None:
    for name, length in (("b", 5), ("a", 3)):  # written out of order
        npz(tmp_path / f"{name}.npz", ids=np.arange(length), mask=np.ones((1, length), int), y=length)
    (tmp_path / ".hidden.npz").write_text("ignored")
    (tmp_path / "README.md").write_text("ignored")
    samples = opened(tmp_path, IDS, MASK, labels=Labels(array="y"))
    assert [s.key for s in samples] == [f"{tmp_path.name}/a.npz", f"{tmp_path.name}/b.npz"]
    assert [s.feeds["ids"].shape for s in samples] == [(1, 3), (1, 5)]
    assert samples.labels == [3, 5]


def test_folder_of_images(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "p", "b.png", "a.PNG", "c.bmp")
    samples = opened(folder, PICTURE, images={"picture": ImageInput()})
    assert [s.key for s in samples] == ["p/a.PNG", "p/b.png", "p/c.bmp"]
    assert values(samples, "picture") == [1, 0, 2]


def test_function_is_called_for_each_iteration(tmp_path: Path) -> None:
    name = module(tmp_path, "data_ok", "for i in range(4): yield {'x': np.full((3, 4), i, 'f4')}, i * 10")
    samples = opened(name, X, base=tmp_path)
    assert values(samples) == values(samples) == [0, 1, 2, 3]
    assert samples.labels == [0, 10, 20, 30] == [s.label for s in samples]
    assert [s.key for s in samples][3] == "data_ok:samples[3]"
    assert opened(name, X, base=tmp_path, samples=2).labels == [0, 20]
    assert str(tmp_path) not in sys.path


def test_fewer_samples_are_spread_evenly(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.stack([ROW + i for i in range(10)]))
    assert values(opened(tmp_path / "a.npy", X, samples=4)) == [0, 2, 5, 7]
    assert len(opened(tmp_path / "a.npy", X, samples=99)) == 10
    folder = npy_folder(tmp_path / "n", *(ROW + i for i in range(10)))
    assert values(opened(folder, X, samples=5)) == [0, 2, 4, 6, 8]


def test_one_sample_in_memory_at_a_time(tmp_path: Path) -> None:
    wide = InputSpec("x", F4, ("batch", 512, 512))
    folder = npy_folder(tmp_path / "n")
    for index in range(200):
        np.save(folder / f"{index:03}.npy", np.full((512, 512), index, np.float32))
    np.save(tmp_path / "stack.npy", np.zeros((40, 512, 512), np.float32))
    npz(tmp_path / "stack.npz", x=np.zeros((40, 512, 512), np.float32))
    for path, count in ((folder, 200), (tmp_path / "stack.npy", 40), (tmp_path / "stack.npz", 40)):
        tracemalloc.start()
        try:
            assert sum(1 for _ in opened(path, wide)) == count
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 5 * 2**20, path


# ---- casts


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("f8", "f4"), ("f2", "f4"), (">f4", "f4"), ("i4", "i8"), ("u1", "u2"), ("f4", "f8")],
)
def test_casts_that_are_allowed(tmp_path: Path, given: str, wanted: str) -> None:
    folder = npy_folder(tmp_path / "n", ROW.astype(given))
    sample = next(iter(opened(folder, InputSpec("x", np.dtype(wanted), X.shape))))
    assert sample.feeds["x"].dtype == np.dtype(wanted)
    np.testing.assert_array_equal(sample.feeds["x"][0], ROW)


@pytest.mark.parametrize(
    ("given", "wanted"), [("i8", "i4"), ("u1", "f4"), ("f4", "i8"), ("f4", "f2"), ("?", "i8"), ("f8", "f2")]
)
def test_casts_that_are_refused(tmp_path: Path, given: str, wanted: str) -> None:
    folder = npy_folder(tmp_path / "n", ROW.astype(given))
    dtype = np.dtype(wanted)
    with pytest.raises(
        SamplesError,
        match=rf"sample 0 \(n/000\.npy\): input 'x' is {np.dtype(given)}, the model wants {dtype}",
    ):
        opened(folder, InputSpec("x", dtype, X.shape))


# ---- errors that opening finds


def bad(value: float) -> Any:
    array = ROW.astype(np.float64)
    array[1, 2] = array[2, 0] = value
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (ROW[:, :3], r"shape \[1, 3, 3\], the model wants \[batch, 3, 4\]: axis 2 must be 4, it is 3"),
        (ROW[0], r"shape \[4\], the model wants \[batch, 3, 4\]: give 3 axes, or 2 without the batch axis"),
        (np.zeros((0, 3, 4), "f4"), r"is empty \(shape \[0, 3, 4\]\)"),
        (bad(np.nan), r"holds 2 NaN and 0 infinite values \(as float32\), the first at index \[0, 1, 2\]"),
        (bad(-np.inf), r"holds 0 NaN and 2 infinite values"),
        (bad(1e300), r"holds 0 NaN and 2 infinite values \(as float32\)"),
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_arrays_that_do_not_fit(tmp_path: Path, array: Any, message: str, index: int) -> None:
    """The first sample is checked on opening, the others when they are read."""
    folder = npy_folder(tmp_path / "n", *([array] if index == 0 else [ROW, array]))
    with pytest.raises(SamplesError, match=message) as raised:
        list(opened(folder, X))
    assert f"calibration data, sample {index} (n/00{index}.npy): input 'x'" in str(raised.value)


def test_symbolic_dimensions_agree_within_a_sample(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", ids=np.zeros((2, 5), int), mask=np.zeros((2, 6), int))
    with pytest.raises(
        SamplesError,
        match=r"sample 0 \(a\.npz\[0\]\): input 'mask' .*axis 1 \(seq\) is 6, but input 'ids' .*has seq = 5",
    ):
        opened(path, IDS, MASK)
    unknown = InputSpec("mask", I8, ("batch", "?")), InputSpec("ids", I8, ("batch", "?"))
    assert len(opened(path, *unknown)) == 2


def test_missing_and_unknown_arrays(tmp_path: Path) -> None:
    stack = npz(tmp_path / "a.npz", id=np.zeros((2, 5), int), mask=np.zeros((2, 5), int))
    with pytest.raises(SamplesError, match=r"a\.npz: no array for the model's input 'ids': it has 'id'"):
        opened(stack, IDS, MASK)
    with pytest.raises(SamplesError, match=r"sample 0: .*a\.npz: no array for the model's input 'ids'"):
        opened(tmp_path, IDS, MASK)
    name = module(tmp_path, "data_unknown", "yield {'x': np.zeros((3, 4), 'f4'), 'xx': 1}")
    with pytest.raises(
        SamplesError, match=r"data_unknown:samples\[0\]\): the model has no input 'xx', did you"
    ):
        opened(name, X, base=tmp_path)
    name = module(tmp_path, "data_list", "yield {'x': [1.0, 2.0]}")
    with pytest.raises(SamplesError, match=r"input 'x' is a list; give a numpy array"):
        opened(name, X, base=tmp_path)


def test_stacks_of_different_lengths_or_none(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", ids=np.zeros((2, 5), int), mask=np.zeros((3, 5), int))
    with pytest.raises(SamplesError, match=r"a\.npz: array 'mask' has 3 samples but 'ids' has 2"):
        opened(path, IDS, MASK)
    with pytest.raises(
        SamplesError, match=r"array 'ids' has shape \[0, 5\]; a leading axis with at least one"
    ):
        opened(npz(tmp_path / "b.npz", ids=np.zeros((0, 5), int)), IDS)
    with pytest.raises(SamplesError, match=r"has shape \[\]"):
        opened(npz(tmp_path / "c.npz", ids=5), IDS)


def test_paths_that_hold_no_samples(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match=r"nothing: does not exist \(looked at /"):
        opened(tmp_path / "nothing", X)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SamplesError, match=r"empty: has no files .* known kind: \.npz, \.npy, \.png, \.jpg"):
        opened(tmp_path / "empty", X)
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(SamplesError, match=r"has 1 files, none of them of a known kind"):
        opened(tmp_path / "empty", X)
    with pytest.raises(SamplesError, match=r"notes\.txt: is not sample data; give a folder"):
        opened(tmp_path / "empty" / "notes.txt", X)
    mixed = image_folder(npy_folder(tmp_path / "mixed", ROW), "a.png")
    with pytest.raises(SamplesError, match=r"mixed: mixes \.npy and image files"):
        opened(mixed, X)
    with pytest.raises(SamplesError, match=r"a\.png: is one image; name the folder"):
        opened(mixed / "a.png", X)


def test_broken_files(tmp_path: Path) -> None:
    stack = npz(tmp_path / "a.npz", x=np.random.default_rng(0).random((50, 3, 4), np.float32))
    content = stack.read_bytes()
    stack.write_bytes(content[:1000])
    with pytest.raises(SamplesError, match=r"a\.npz: is broken or not a \.npz file"):
        opened(stack, X)
    damaged = bytearray(content)
    damaged[1500] ^= 0xFF
    stack.write_bytes(bytes(damaged))
    with pytest.raises(SamplesError, match=r"a\.npz: is broken"):
        list(opened(stack, X))
    np.save(tmp_path / "b.npy", np.stack([ROW] * 5))
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-50])
    with pytest.raises(SamplesError, match=r"b\.npy: is broken .*the data end in sample 3 of 5"):
        list(opened(tmp_path / "b.npy", X))
    folder = npy_folder(tmp_path / "n", ROW, ROW, ROW)
    (folder / "001.npy").write_bytes((folder / "001.npy").read_bytes()[:-1])
    with pytest.raises(SamplesError, match=r"sample 1: .*001\.npy: is broken"):
        list(opened(folder, X))
    (folder / "000.npy").write_bytes(b"")
    with pytest.raises(SamplesError, match=r"sample 0: .*000\.npy: is broken"):
        opened(folder, X)


def test_a_flipped_bit_in_an_uncompressed_archive_fails_its_checksum(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.stack([ROW] * 5))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        content[archive.infolist()[0].header_offset + 250] ^= 1
    (tmp_path / "a.npz").write_bytes(bytes(content))
    with pytest.raises(SamplesError, match=r"a\.npz: is broken .*CRC"):
        list(opened(tmp_path / "a.npz", X))
    five = InputSpec("x", F4, (5, 3, 4))
    with pytest.raises(SamplesError, match=r"a\.npz: is broken .*CRC"):
        opened(tmp_path, five)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(SamplesError, match="Python objects"):
        opened(tmp_path / "a.npy", X)
    with pytest.raises(SamplesError, match="allow_pickle=False"):
        opened(tmp_path, X)


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
    monkeypatch.setattr("edgepack.sources.MAX_FUNCTION_SAMPLES", 10)
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


def test_twenty_thousand_tiny_samples_take_moments(tmp_path: Path) -> None:
    dense = np.random.default_rng(0).random((22_000, 22), np.float32)
    spec, ids = InputSpec("dense", F4, ("batch", 22)), np.zeros((22_000, 3), int)
    first = opened(npz(tmp_path / "a.npz", dense=dense[:2000], ids=ids[:2000]), spec, IDS)
    second = opened(npz(tmp_path / "b.npz", dense=dense[2000:], ids=ids[2000:]), spec, IDS)
    start = perf_counter()
    check_disjoint(first, second)
    assert perf_counter() - start < 4  # 0.7 s on an idle core
