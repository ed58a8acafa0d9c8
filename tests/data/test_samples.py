import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sampling import (
    F4,
    I8,
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
from edgepack.errors import SamplesError
from edgepack.ir.inputs import InputSpec

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


def test_text(tmp_path: Path) -> None:
    """Stored as string arrays, fed as the object arrays that the runtime needs."""
    words = InputSpec("words", np.dtype(object), ("batch", "n"))
    path = npz(tmp_path / "a.npz", words=np.asarray([["one", "two"], ["three", "four"]]))
    samples = opened(path, words)
    assert [s.feeds["words"].tolist() for s in samples] == [[["one", "two"]], [["three", "four"]]]
    assert samples.fingerprint == opened(path, words).fingerprint
    assert [s.feeds["words"].dtype for s in samples] == [object, object]
    other = opened(npz(tmp_path / "b.npz", words=np.asarray([["one", "two"], ["three", "five"]])), words)
    assert other.fingerprint != samples.fingerprint


def test_one_input_among_others_may_be_empty(tmp_path: Path) -> None:
    """The KV cache of a decoder is empty at its first token."""
    past = InputSpec("past", F4, ("batch", 2, "past"))
    path = npz(tmp_path / "a.npz", ids=np.zeros((1, 1, 5), int), past=np.zeros((1, 1, 2, 0), "f4"))
    (sample,) = opened(path, InputSpec("ids", I8, ("batch", "seq")), past)
    assert sample.feeds["past"].shape == (1, 2, 0)
    fixed = InputSpec("past", F4, ("batch", 2, 4))
    with pytest.raises(SamplesError, match="axis 2 must be 4, it is 0"):
        opened(path, InputSpec("ids", I8, ("batch", "seq")), fixed)


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
    with pytest.raises(SamplesError, match="Python objects"):
        opened(tmp_path, X)
