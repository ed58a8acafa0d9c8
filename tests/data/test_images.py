from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edgepack.config.recipe import ImageInput
from edgepack.data.images import read_image
from edgepack.errors import ConfigError, SamplesError

FLOAT = np.dtype(np.float32)
Pixels = npt.NDArray[np.uint8]


def picture(width: int, height: int) -> Pixels:
    """Smooth in both axes and different in each channel, so that a swap or a flip shows."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(pixels: npt.NDArray[Any], name: str = "a.png") -> Path:
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name

    return write


def test_classifier_preprocessing(save: Callable[..., Path]) -> None:
    pixels = picture(12, 10)
    got = read_image(save(pixels), ImageInput(height=10, width=12, mean=127, std=128), FLOAT)
    want = ((pixels.astype("f4") - 127) / 128).transpose(2, 0, 1)[None]
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_detector_preprocessing_flips_to_bgr(save: Callable[..., Path]) -> None:
    pixels = picture(8, 8)
    got = read_image(save(pixels), ImageInput(color="bgr", std=255), FLOAT)
    np.testing.assert_allclose(got[0], pixels[:, :, ::-1].transpose(2, 0, 1) / 255, atol=1e-6)


@pytest.mark.parametrize(("width", "height", "becomes"), [(101, 30, 162), (20, 30, 48), (60, 20, 144)])
def test_text_line_keeps_its_aspect_ratio(
    save: Callable[..., Path], width: int, height: int, becomes: int
) -> None:
    path = save(picture(width, height))
    spec = ImageInput(height=48, min_width=48, color="bgr", mean=127.5, std=127.5)
    got = read_image(path, spec, FLOAT)
    resized = Image.open(path).resize((becomes, 48), Image.Resampling.BILINEAR)
    want = ((np.asarray(resized, "f4")[:, :, ::-1] / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]
    assert got.shape == (1, 3, 48, becomes)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_only_width_given_rounds_the_height_up(save: Callable[..., Path]) -> None:
    assert read_image(save(picture(30, 31)), ImageInput(width=10), FLOAT).shape == (1, 3, 11, 10)


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_filters_are_pillows(save: Callable[..., Path], name: str) -> None:
    path = save(picture(40, 30))
    got = read_image(path, ImageInput.model_validate({"height": 9, "width": 7, "filter": name}), FLOAT)
    want = np.asarray(Image.open(path).resize((7, 9), Image.Resampling[name.upper()]))
    np.testing.assert_array_equal(got[0], want.transpose(2, 0, 1))


def test_crop_takes_the_centre(save: Callable[..., Path]) -> None:
    path = save(picture(60, 40))
    got = read_image(path, ImageInput(fit="crop", resize_short=20, height=16, width=12), FLOAT)
    scaled = np.asarray(Image.open(path).resize((30, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(got[0], scaled[2:18, 9:21].transpose(2, 0, 1))


def test_mean_and_std_follow_the_order_of_color_and_nhwc_keeps_channels_last(
    save: Callable[..., Path],
) -> None:
    pixels = picture(4, 6)
    spec = ImageInput(color="bgr", mean=(1, 2, 3), std=(4, 5, 6), layout="nhwc")
    got = read_image(save(pixels), spec, FLOAT)
    want = (pixels[:, :, ::-1].astype("f4") - [1, 2, 3]) / [4, 5, 6]
    assert got.shape == (1, 6, 4, 3)
    np.testing.assert_allclose(got[0], want, rtol=1e-6)


def test_gray_palette_and_alpha_become_the_asked_channels(save: Callable[..., Path], tmp_path: Path) -> None:
    gray = save(picture(4, 6)[:, :, 0], "gray.png")
    assert read_image(gray, ImageInput(), FLOAT).shape == (1, 3, 6, 4)
    assert read_image(save(picture(4, 6)), ImageInput(color="gray"), FLOAT).shape == (1, 1, 6, 4)
    Image.fromarray(picture(4, 6)).convert("P").save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png", ImageInput(), FLOAT).shape == (1, 3, 6, 4)
    transparent = np.dstack([picture(4, 6), np.zeros((6, 4), np.uint8)])
    got = read_image(save(transparent, "rgba.png"), ImageInput(layout="nhwc"), FLOAT)
    np.testing.assert_array_equal(got[0], picture(4, 6))


def test_the_rotation_in_exif_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    Image.fromarray(picture(16, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", ImageInput(), FLOAT).shape == (1, 3, 8, 16)


def test_uint8_inputs_get_raw_pixels(save: Callable[..., Path]) -> None:
    pixels = picture(5, 4)
    got = read_image(save(pixels), ImageInput(layout="nhwc"), np.dtype(np.uint8))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got[0], pixels)


def test_float16_is_rounded_at_the_end(save: Callable[..., Path]) -> None:
    pixels = picture(5, 4)
    got = read_image(save(pixels), ImageInput(std=255, layout="nhwc"), np.dtype(np.float16))
    np.testing.assert_array_equal(got[0], (pixels.astype("f4") / np.float32(255)).astype("f2"))


@pytest.mark.parametrize(
    ("keys", "dtype", "message"),
    [
        ({"mean": 127}, np.uint8, "mean must be 0 and std 1"),
        ({"std": 2}, np.uint8, "mean must be 0 and std 1"),
        ({}, np.int64, "int64; images become floats or uint8"),
        ({"mean": (1, 2)}, np.float32, "mean has 2 values; give one, or 3"),
        ({"std": (1, 2, 3), "color": "gray"}, np.float32, "std has 3 values; give one, or 1"),
        ({"std": (1, 0, 1)}, np.float32, "std not 0"),
        ({"fit": "crop", "height": 4}, np.float32, "needs height, width and resize_short"),
        ({"resize_short": 4}, np.float32, "only fit: crop uses it"),
    ],
)
def test_impossible_preprocessing(
    save: Callable[..., Path], keys: dict[str, Any], dtype: type, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_image(save(picture(8, 8)), ImageInput.model_validate(keys), np.dtype(dtype))
    assert "a.png" in str(raised.value)


def test_crop_larger_than_the_image(save: Callable[..., Path]) -> None:
    with pytest.raises(
        SamplesError, match=r"a\.png: is 8 x 8 after resize_short, less than the crop of 9 x 8"
    ):
        read_image(save(picture(16, 16)), ImageInput(fit="crop", resize_short=8, height=8, width=9), FLOAT)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.webp"])
@pytest.mark.parametrize("kept", [0.0, 0.6])
def test_truncated_files(save: Callable[..., Path], name: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(noise, name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(SamplesError, match=rf"{name}: is not a readable image.*replace or remove"):
        read_image(path, ImageInput(), FLOAT)


def test_a_damaged_png_chunk(save: Callable[..., Path]) -> None:
    path = save(picture(64, 64))
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(SamplesError, match="not a readable image"):
        read_image(path, ImageInput(), FLOAT)


def test_sixteen_bits_would_be_clipped_and_are_refused(save: Callable[..., Path]) -> None:
    path = save(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(SamplesError, match="more than 8 bits a channel"):
        read_image(path, ImageInput(), FLOAT)


@pytest.mark.parametrize(
    ("width", "height", "becomes"), [(60, 20, (24, 8)), (80, 20, (32, 8)), (10, 20, (4, 8))]
)
def test_padding_keeps_the_aspect_ratio_and_fills_with_zeros(
    save: Callable[..., Path], width: int, height: int, becomes: tuple[int, int]
) -> None:
    path = save(picture(width, height))
    got = read_image(path, ImageInput(height=8, width=32, fit="pad", mean=100, std=2), FLOAT)
    resized = Image.open(path).resize(becomes, Image.Resampling.BILINEAR)
    want = ((np.asarray(resized, "f4") - 100) / 2).transpose(2, 0, 1)
    assert got.shape == (1, 3, 8, 32)
    np.testing.assert_allclose(got[0, :, :, : becomes[0]], want, atol=1e-6)
    assert not got[0, :, :, becomes[0] :].any()


def test_padding_below_where_the_width_is_full(save: Callable[..., Path]) -> None:
    got = read_image(save(picture(64, 8)), ImageInput(height=8, width=32, fit="pad", mean=-1), FLOAT)
    assert got[0, :, :4].all() and not got[0, :, 4:].any()
    with pytest.raises(ConfigError, match="fit: pad needs height and width"):
        read_image(save(picture(64, 8)), ImageInput(height=8, fit="pad"), FLOAT)
