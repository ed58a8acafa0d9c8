"""Reading an image file as one input tensor."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgepack.config.recipe import ImageInput
from edgepack.errors import ConfigError, SamplesError

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def check_image_input(place: str, spec: ImageInput, dtype: np.dtype[Any]) -> None:
    """Refuse preprocessing that cannot work for an input of type ``dtype``; ``place`` opens the message.

    Raises:
        ConfigError: the message says which key to change.
    """
    channels = 1 if spec.color == "gray" else 3
    for key, value in (("mean", spec.mean), ("std", spec.std)):
        if isinstance(value, tuple) and len(value) != channels:
            raise ConfigError(
                f"{place}: {key} has {len(value)} values; give one, or {channels} for color: {spec.color}"
            )
    if np.any(np.asarray(spec.std) == 0) or not np.all(
        np.isfinite([*np.ravel(spec.std), *np.ravel(spec.mean)])
    ):
        raise ConfigError(f"{place}: mean and std must be finite and std not 0")
    if spec.fit == "crop" and None in (spec.height, spec.width, spec.resize_short):
        raise ConfigError(f"{place}: fit: crop needs height, width and resize_short")
    if spec.fit == "pad" and None in (spec.height, spec.width):
        raise ConfigError(f"{place}: fit: pad needs height and width")
    if spec.fit != "crop" and spec.resize_short is not None:
        raise ConfigError(f"{place}: resize_short: only fit: crop uses it; add fit: crop or remove it")
    if dtype == np.uint8:
        if np.any(np.asarray(spec.mean) != 0) or np.any(np.asarray(spec.std) != 1):
            raise ConfigError(f"{place}: the model takes uint8 pixels, so mean must be 0 and std 1")
    elif not np.issubdtype(dtype, np.floating):
        raise ConfigError(f"{place}: the model's input is {dtype}; images become floats or uint8 only")


def read_image(path: Path, spec: ImageInput, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The image in ``path`` as a tensor ``[1, C, H, W]`` or ``[1, H, W, C]`` of ``dtype``.

    Pixels are converted to ``color`` and resized as 8-bit values by Pillow, then become
    ``(pixel - mean) / std`` in float32. The rotation in EXIF data is not applied: pixels stay in the order of
    the file, as most training pipelines read them. Transparency is dropped. With only one of height and
    width, the other is ``ceil(size * ratio)``. Padding keeps the aspect ratio in the same way; its zeros are
    not put through ``mean`` and ``std``. A crop follows torchvision: the longer side is
    ``int(resize_short * long / short)``, offsets are ``round((size - crop) / 2)``.

    Raises:
        ConfigError: see `check_image_input`.
        SamplesError: not an image, broken, more than 8 bits a channel, or smaller than the crop.
    """
    from PIL import Image  # noqa: PLC0415 - needed only for image folders

    check_image_input(f"preprocessing of {path}", spec, dtype)
    # Broken PNG chunks are a SyntaxError in Pillow, huge sizes a DecompressionBombError.
    broken = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise SamplesError(
                    f"{path}: has more than 8 bits a channel (mode {file.mode}), which would be clipped; "
                    "convert it to 8 bits, or give the arrays as .npy"
                )
            picture = file.convert("L" if spec.color == "gray" else "RGB")
    except broken as error:
        raise SamplesError(f"{path}: is not a readable image ({error}); replace or remove it") from error
    pixels = np.asarray(_fit(picture, spec, path))
    if pixels.ndim == 2:
        pixels = pixels[:, :, np.newaxis]
    if spec.color == "bgr":
        pixels = pixels[:, :, ::-1]
    if dtype != np.uint8:
        mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
        pixels = ((pixels.astype(np.float32) - mean) / std).astype(dtype, copy=False)
    if spec.fit == "pad":
        assert spec.height is not None and spec.width is not None  # check_image_input has made sure
        missing = [(0, spec.height - pixels.shape[0]), (0, spec.width - pixels.shape[1]), (0, 0)]
        pixels = np.pad(pixels, missing)
    if spec.layout == "nchw":
        pixels = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)[np.newaxis]


def _fit(picture: "Image.Image", spec: ImageInput, path: Path) -> "Image.Image":
    from PIL import Image  # noqa: PLC0415

    resampling = Image.Resampling[spec.filter.upper()]
    width, height = picture.size
    if spec.fit != "crop":
        size = _padded(width, height, spec) if spec.fit == "pad" else _stretched(width, height, spec)
        return picture if size == picture.size else picture.resize(size, resampling)
    # check_image_input has made sure of the three
    assert spec.height is not None and spec.width is not None and spec.resize_short is not None
    short = min(width, height)
    scaled_width, scaled_height = (
        spec.resize_short if side == short else int(spec.resize_short * side / short)
        for side in (width, height)
    )
    if scaled_width < spec.width or scaled_height < spec.height:
        raise SamplesError(
            f"{path}: is {scaled_width} x {scaled_height} after resize_short, less than the crop of "
            f"{spec.width} x {spec.height}; raise resize_short"
        )
    left, top = round((scaled_width - spec.width) / 2), round((scaled_height - spec.height) / 2)
    scaled = picture.resize((scaled_width, scaled_height), resampling)
    return scaled.crop((left, top, left + spec.width, top + spec.height))


def _padded(width: int, height: int, spec: ImageInput) -> tuple[int, int]:
    """Width and height to resize to: as large as fits, the aspect ratio kept; integers throughout."""
    assert spec.height is not None and spec.width is not None
    if width * spec.height <= spec.width * height:
        return -(-width * spec.height // height), spec.height
    return spec.width, -(-height * spec.width // width)


def _stretched(width: int, height: int, spec: ImageInput) -> tuple[int, int]:
    """Width and height to resize to; integers throughout, so that rounding up is exact."""
    if spec.height is None and spec.width is None:
        return width, height
    if spec.height is None:
        assert spec.width is not None
        return spec.width, -(-height * spec.width // width)
    if spec.width is None:
        return max(spec.min_width, -(-width * spec.height // height)), spec.height
    return spec.width, spec.height
