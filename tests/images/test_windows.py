"""Windows of photos at full resolution: the right pixels, in every orientation, and the exact way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from mast3r_sfm.errors import InputError, ShapeError
from mast3r_sfm.images.framing import Box
from mast3r_sfm.images.loading import DecodedPhoto, decode_photo, load_image
from mast3r_sfm.types import ImageRecord, Preparation

Textured = Callable[..., NDArray[np.uint8]]
WIDTH, HEIGHT = 90, 61
LOSSLESS: dict[str, dict[str, Any]] = {"png": {}, "tif": {}, "webp": {"lossless": True}, "bmp": {}}


def written(
    folder: Path, stored: NDArray[np.uint8], orientation: int, extension: str = "png", **options: Any
) -> tuple[Path, ImageRecord]:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    path = folder / f"a.{extension}"
    Image.fromarray(stored).save(path, exif=tags, **{**LOSSLESS.get(extension, {}), **options})
    height, width = stored.shape[:2]
    return path, ImageRecord(name=path.name, width_px=width, height_px=height, sha256="", orientation=orientation)


def opened(folder: Path, stored: NDArray[np.uint8], orientation: int = 1, **options: Any) -> DecodedPhoto:
    return decode_photo(folder, written(folder, stored, orientation, **options)[1])


def upright_place(x: float, y: float, orientation: int) -> tuple[float, float]:
    """Where a stored pixel stands upright, written out from the EXIF standard's table (0th row, 0th column)."""
    return {
        1: (x, y),  # top, left
        2: (WIDTH - x, y),  # top, right
        3: (WIDTH - x, HEIGHT - y),  # bottom, right
        4: (x, HEIGHT - y),  # bottom, left
        5: (y, x),  # left, top
        6: (HEIGHT - y, x),  # right, top
        7: (HEIGHT - y, WIDTH - x),  # right, bottom
        8: (y, WIDTH - x),  # left, bottom
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "tif", "webp", "bmp"])
def test_each_pixel_of_a_window_is_found_in_the_file(
    tmp_path: Path, textured: Textured, orientation: int, extension: str
) -> None:
    stored = textured(WIDTH, HEIGHT)
    photo = opened(tmp_path, stored, orientation, extension=extension)
    window = photo.window((11, 23, 41, 53), (30, 30))
    assert window.pixels.shape == (30, 30, 3)
    rows, columns = np.mgrid[0:30, 0:30]
    places = window.transform.to_photo(np.stack([columns.ravel(), rows.ravel()], axis=1) + 0.5)
    np.testing.assert_allclose(places % 1, 0.5)
    x, y = np.floor(places).astype(int).T
    np.testing.assert_array_equal(stored[y, x].reshape(30, 30, 3), window.pixels)
    for place, row, column in zip(places.tolist(), rows.ravel(), columns.ravel(), strict=True):
        assert upright_place(*place, orientation) == pytest.approx((column + 11.5, row + 23.5))
    assert window.transform.scale == pytest.approx(1)
    assert window.pixels.flags.writeable


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_window_is_a_part_of_the_upright_photo(tmp_path: Path, textured: Textured, orientation: int) -> None:
    path, record = written(tmp_path, textured(WIDTH, HEIGHT), orientation, "jpg", quality=90)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    photo = decode_photo(tmp_path, record)
    whole: Box = (0, 0, *upright.size)
    for box in (whole, (3, 5, 44, 37), (upright.width - 20, 0, upright.width, 16)):
        window = photo.window(box, (box[2] - box[0], box[3] - box[1]))
        np.testing.assert_array_equal(window.pixels, np.asarray(upright.crop(box)))
    large = load_image(tmp_path, record, Preparation(size_px=100))
    np.testing.assert_allclose(photo.window(whole, upright.size).transform.matrix, large.transform.matrix)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(17, 29), (50, 40)])
def test_a_resized_window_keeps_its_place(tmp_path: Path, orientation: int, size: tuple[int, int]) -> None:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    centre = (35.2, 27.9)
    blob = np.rint(255 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * 3.0**2))).astype(np.uint8)
    photo = opened(tmp_path, np.repeat(blob[:, :, None], 3, 2), orientation)
    column, row = (int(place) for place in upright_place(*centre, orientation))
    window = photo.window((column - 14, row - 16, column + 20, row + 16), size)
    assert window.pixels.shape == (size[1], size[0], 3)
    grey = np.where(window.pixels[:, :, 0] < 4, 0, window.pixels[:, :, 0]).astype(np.float64)
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]] + 0.5
    found = np.array([[(columns * grey).sum(), (rows * grey).sum()]]) / grey.sum()
    np.testing.assert_allclose(window.transform.to_photo(found), [centre], atol=0.1)


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 91, 5), (0, 0, 5, 62), (5, 0, 5, 5), (0, 9, 5, 2)])
def test_windows_lie_in_the_photo(tmp_path: Path, textured: Textured, box: Box) -> None:
    photo = opened(tmp_path, textured(WIDTH, HEIGHT))
    with pytest.raises(ShapeError, match=r"a\.png: window .* does not lie in the upright photo of 90×61 px"):
        photo.window(box, (5, 5))


def test_a_photo_that_changed_is_refused(tmp_path: Path, textured: Textured) -> None:
    _, record = written(tmp_path, textured(WIDTH, HEIGHT), 1)
    Image.fromarray(textured(80, 60)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="changed during the run"):
        decode_photo(tmp_path, record)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, textured: Textured, mode: str) -> None:
    grey = textured(WIDTH, HEIGHT)[:, :, 0]
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "a.png")
    record = ImageRecord(name="a.png", width_px=WIDTH, height_px=HEIGHT, sha256="")
    window = decode_photo(tmp_path, record).window((10, 10, 40, 30), (30, 20))
    loaded = load_image(tmp_path, record, Preparation(size_px=100))
    np.testing.assert_array_equal(window.pixels, loaded.pixels[10:30, 10:40])
