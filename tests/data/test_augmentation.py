"""Image augmentation: reproducible crops."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.sampling import IDS, PICTURE, image_folder, npz, opened

from edgepack.config.recipe import Data, ImageInput, Labels
from edgepack.data.augmentation import augmented
from edgepack.data.samples import Samples, open_samples
from edgepack.errors import ConfigError
from edgepack.ir.inputs import InputSpec

COUNT = 4


def ramps(folder: Path, spec: InputSpec = PICTURE, number: int = 3) -> Samples:
    """Images with a ramp along the width, each starting where the previous one ended."""
    rows = np.broadcast_to(np.arange(6, dtype=np.float32), (number, 1, 3, 8, 6))
    stacked = rows + 10 * np.arange(number, dtype=np.float32).reshape(-1, 1, 1, 1, 1)
    if spec.shape and spec.shape[-1] == 3:
        stacked = np.moveaxis(stacked, 2, 4)
    return opened(npz(folder / "x.npz", picture=stacked), spec)


@pytest.mark.parametrize("shape", [("batch", 3, 8, 6), ("batch", 8, 6, 3)])
def test_augmented_copies_are_crops_of_their_image(shape: tuple[int | str, ...], tmp_path: Path) -> None:
    samples = ramps(tmp_path, replace(PICTURE, shape=shape))
    seen = list(augmented(samples, COUNT, seed=0))
    assert [s.key for s in seen[: COUNT + 1]] == ["x.npz[0]", *(f"x.npz[0], view {v}" for v in range(1, 5))]
    turned = set()
    for number, original in enumerate(samples):
        own = seen[number * (COUNT + 1) : (number + 1) * (COUNT + 1)]
        assert np.array_equal(own[0].feeds["picture"], original.feeds["picture"])
        for view in own[1:]:
            picture = view.feeds["picture"]
            assert picture.shape == original.feeds["picture"].shape and picture.dtype == np.float32
            assert original.feeds["picture"].min() <= picture.min()
            assert picture.max() <= original.feeds["picture"].max()
            row = picture[0, 0, 0] if shape[1] == 3 else picture[0, 0, :, 0]
            steps = np.diff(row)
            assert np.all(steps >= -1e-6) or np.all(steps <= 1e-6)
            assert 0 < np.abs(steps).max() <= 1  # a crop, resized to the whole
            turned.add(steps.sum() < 0)
    assert turned == {True, False}


def test_augmentation_is_reproducible_and_depends_on_the_seed(tmp_path: Path) -> None:
    samples = augmented(ramps(tmp_path), COUNT, seed=0)
    first, again = ([s.feeds["picture"] for s in samples] for _ in range(2))
    assert all(map(np.array_equal, first, again))
    # For any subset of the samples.
    some = replace(samples, indices=(3, 4, 7, 14))
    assert all(map(np.array_equal, [s.feeds["picture"] for s in some], [first[i] for i in some.indices]))
    other = [s.feeds["picture"] for s in augmented(ramps(tmp_path), COUNT, seed=1)]
    assert np.array_equal(first[0], other[0]) and not np.array_equal(first[1], other[1])
    # A sample keeps its augmented copies when others are removed.
    half = [s.feeds["picture"] for s in augmented(ramps(tmp_path).halves()[1], COUNT, seed=0)]
    assert all(map(np.array_equal, half, first[COUNT + 1 : 2 * COUNT + 2]))


def test_augmented_copies_keep_labels_and_change_the_fingerprint(tmp_path: Path) -> None:
    image_folder(tmp_path / "d", "a1.png", "b2.png")
    data = Data(path=str(tmp_path / "d"), labels=Labels(filename=r"(\d)"))
    samples = open_samples(data, "calibration", [PICTURE], {"picture": ImageInput()}, base=tmp_path)
    seen = augmented(samples, 2, seed=0)
    assert seen.labels == [1, 1, 1, 2, 2, 2]
    assert seen.fingerprint not in (samples.fingerprint, augmented(samples, 2, seed=1).fingerprint)
    assert augmented(samples, 0, seed=0) is samples


def test_inputs_without_images_are_refused(tmp_path: Path) -> None:
    samples = opened(npz(tmp_path / "x.npz", ids=np.zeros((2, 5), np.int64)), IDS)
    with pytest.raises(ConfigError, match=r"views: none of the inputs \(ids\)"):
        augmented(samples, 1, seed=0)
