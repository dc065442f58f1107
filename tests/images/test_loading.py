"""Reading photos for a network: every orientation, every mode, every size, and the exact way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mast3r_sfm.errors import InputError
from mast3r_sfm.images.decoding import to_8_bit
from mast3r_sfm.images.framing import frame_photo
from mast3r_sfm.images.loading import load_grey, load_image
from mast3r_sfm.types import ImageRecord, LoadedImage, Preparation

Photo = Callable[..., Path]
Textured = Callable[..., NDArray[np.uint8]]
ORIENTATIONS = range(1, 9)
SHRUNK = Preparation(size_px=1024)
MAST3R = Preparation(size_px=512, patch_px=16)
SQUARE_CROP = Preparation(size_px=224, patch_px=16, square_crop=True)


def record_of(path: Path, *, orientation: int = 1, size: tuple[int, int] | None = None) -> ImageRecord:
    if size is None:
        with Image.open(path) as image:
            size = image.size
    width, height = size
    return ImageRecord(name=path.name, width_px=width, height_px=height, sha256="", orientation=orientation)


def load(path: Path, preparation: Preparation = SHRUNK, **options: Any) -> LoadedImage:
    return load_image(path.parent, record_of(path, **options), preparation)


def oriented(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("extension", ["png", "tif", "jpg", "webp"])
def test_a_marked_pixel_is_found_again_in_every_orientation(tmp_path: Path, orientation: int, extension: str) -> None:
    marks = {"red": (7, 20), "green": (90, 4), "blue": (40, 50)}  # column and row in the stored file
    stored = np.zeros((60, 100, 3), np.uint8)
    for channel, (column, row) in enumerate(marks.values()):
        stored[row - 2 : row + 3, column - 2 : column + 3, channel] = 255
    options = {"lossless": True} if extension == "webp" else {"quality": 100, "subsampling": 0}
    path = tmp_path / f"a.{extension}"
    Image.fromarray(stored).save(path, exif=oriented(orientation), **(options if extension in ("webp", "jpg") else {}))
    image = load(path, orientation=orientation, size=(100, 60))
    assert image.pixels.shape == ((60, 100, 3) if orientation < 5 else (100, 60, 3))
    for channel, (column, row) in enumerate(marks.values()):
        rows, columns = np.nonzero(image.pixels[:, :, channel] > 128)
        assert len(rows) == 25
        found = np.array([[columns.mean() + 0.5, rows.mean() + 0.5]])
        np.testing.assert_allclose(image.transform.to_photo(found), [[column + 0.5, row + 0.5]], atol=1e-9)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_upright_image_is_what_exif_says(tmp_path: Path, textured: Textured, orientation: int) -> None:
    from PIL import ImageOps

    path = tmp_path / "a.png"
    Image.fromarray(textured(64, 48)).save(path, exif=oriented(orientation))
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(load(path, orientation=orientation, size=(64, 48)).pixels, np.asarray(expected))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("extension", ["png", "tif", "jpg"])
@pytest.mark.parametrize("size", [(1001, 667), (667, 1001), (803, 800)])
def test_a_shrunk_blob_stays_where_it_is(
    tmp_path: Path, orientation: int, extension: str, size: tuple[int, int]
) -> None:
    # A smooth blob near the far corner, where a resize whose scale is not exact errs most.
    width, height = size
    centre = (width - 60.3, height - 50.7)
    y, x = np.mgrid[0:height, 0:width] + 0.5
    blob = 255 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * 12.0**2))
    path = tmp_path / f"a.{extension}"
    Image.fromarray(blob.astype(np.uint8)).save(
        path, exif=oriented(orientation), **({"quality": 98} if extension == "jpg" else {})
    )
    image = load(path, Preparation(size_px=240), orientation=orientation, size=size)
    assert max(image.pixels.shape) == 240
    grey = image.pixels[:, :, 0].astype(np.float64)
    grey[grey < 4] = 0
    rows, columns = np.mgrid[0 : grey.shape[0], 0 : grey.shape[1]] + 0.5
    found = np.array([[(columns * grey).sum(), (rows * grey).sum()]]) / grey.sum()
    # 0.15 stored pixels are 0.04 network pixels; a scale that ignores the overhang of a reduced JPEG errs by a pixel.
    np.testing.assert_allclose(image.transform.to_photo(found), [centre], atol=0.15)


def blobs(stored: tuple[int, int], centres: NDArray[np.float64], sigma: float) -> NDArray[np.uint8]:
    """A photo [H, W, 3] with one blob per channel around the stored pixels `centres` [3, 2]."""
    y, x = np.mgrid[0 : stored[1], 0 : stored[0], 0:1][:2] + 0.5
    square = (x - centres[:, 0]) ** 2 + (y - centres[:, 1]) ** 2
    photo: NDArray[np.uint8] = np.rint(255 * np.exp(-square / (2 * sigma**2))).astype(np.uint8)
    return photo


def centroids(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Of each channel, in pixels whose first has its centre at (0.5, 0.5): [3, 2]."""
    weights = np.where(pixels < 8, 0, pixels).astype(np.float64)
    rows, columns = np.mgrid[0 : pixels.shape[0], 0 : pixels.shape[1], 0:1][:2] + 0.5
    total = weights.sum(axis=(0, 1))
    x, y = (columns * weights).sum(axis=(0, 1)) / total, (rows * weights).sum(axis=(0, 1)) / total
    return np.stack([x, y], axis=1)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("extension", ["png", "tif", "jpg"])
@pytest.mark.parametrize(
    ("upright", "preparation", "seen"),
    [
        ((811, 605), MAST3R, (512, 368)),
        ((605, 811), MAST3R, (368, 512)),
        ((301, 203), MAST3R, (512, 336)),
        ((203, 301), MAST3R, (336, 512)),
        ((640, 640), MAST3R, (512, 384)),
        ((150, 150), MAST3R, (512, 384)),
        ((1407, 41), Preparation(size_px=128, patch_px=16), (128, 16)),
        ((41, 1407), Preparation(size_px=128, patch_px=16), (16, 128)),
        ((500, 333), SQUARE_CROP, (224, 224)),
        ((333, 500), SQUARE_CROP, (224, 224)),
    ],
)
def test_blobs_are_found_again_through_resize_and_crop(
    tmp_path: Path,
    orientation: int,
    extension: str,
    upright: tuple[int, int],
    preparation: Preparation,
    seen: tuple[int, int],
) -> None:
    stored = upright if orientation < 5 else upright[::-1]
    reach = 0.3 * min(stored)
    centres = np.array(stored) / 2 + reach * np.array([[-0.9, -0.7], [0.8, -0.3], [0.1, 0.9]])
    scale = min(upright) / (min(seen) if upright[0] != upright[1] else max(seen))
    path = tmp_path / f"a.{extension}"
    options: dict[str, Any] = {"quality": 98, "subsampling": 0} if extension == "jpg" else {}
    photo = blobs(stored, centres, max(1.2, 1.2 * scale))
    Image.fromarray(photo).save(path, exif=oriented(orientation), **options)
    image = load(path, preparation, orientation=orientation, size=stored)
    assert image.pixels.shape == (*seen[::-1], 3)
    found = image.transform.to_photo(centroids(image.pixels))
    # A crop or a scale that is off by half a pixel of the network would be ten times this.
    np.testing.assert_allclose(found, centres, atol=0.05 * scale)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("mode", ["CMYK", "L", "LA", "P", "1", "I;16", "F"])
def test_all_modes_and_orientations_are_prepared_as_mast3r_does(
    tmp_path: Path, textured: Textured, mode: str, orientation: int
) -> None:
    colours = textured(150, 100)
    grey = np.where(colours[:, :, 0] == colours[:, :, 0].max(), 255, colours[:, :, 0])
    if mode == "I;16":
        photo = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "F":
        photo = Image.fromarray((grey / 255).astype(np.float32))
    else:
        photo = Image.fromarray(colours).convert(mode)
    assert photo.mode == mode
    path = tmp_path / ("a.tif" if mode in ("F", "CMYK") else "a.png")
    photo.save(path, exif=oriented(orientation))
    framing = frame_photo((150, 100) if orientation < 5 else (100, 150), MAST3R)
    # Large enough for nothing to be shrunk: all pixels, upright.
    whole = Image.fromarray(load(path, orientation=orientation, size=(150, 100)).pixels)
    expected = whole.resize(framing.resized, Image.Resampling.BICUBIC).crop(framing.box)
    prepared = load(path, MAST3R, orientation=orientation, size=(150, 100))
    np.testing.assert_array_equal(prepared.pixels, np.asarray(expected))
    assert prepared.pixels.flags.writeable


def test_with_patches_a_jpeg_is_decoded_whole(photo: Photo) -> None:
    path = photo("a.jpg", width=2000, height=1500, subsampling=2)
    with Image.open(path) as image:
        whole = image.resize((512, 384), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(load(path, MAST3R).pixels, np.asarray(whole))
    assert (load(path, Preparation(size_px=512)).pixels != np.asarray(whole)).any()  # the fast way


def test_a_photo_is_never_enlarged(photo: Photo) -> None:
    image = load(photo("a.png", width=100, height=70))
    assert image.pixels.shape == (70, 100, 3)
    np.testing.assert_array_equal(image.transform.matrix, [[1, 0, 0], [0, 1, 0]])


def test_pixels_can_be_written(photo: Photo) -> None:
    assert load(photo("a.png")).pixels.flags.writeable


def test_shrinking_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((600, 1200, 3), np.uint8)
    stripes[:, ::2] = 255
    for extension in ("png", "jpg"):
        Image.fromarray(stripes).save(tmp_path / f"a.{extension}")
        shrunk = load(tmp_path / f"a.{extension}", Preparation(size_px=300)).pixels[5:-5, 5:-5]
        assert 110 < shrunk.mean() < 145
        assert shrunk.std() < 8


class TestModes:
    """Every mode Pillow reads becomes RGB that looks like the photo."""

    @pytest.fixture
    def colours(self, textured: Textured) -> np.ndarray:
        return textured(96, 80)

    @pytest.mark.parametrize(
        ("mode", "extension", "tolerance"),
        [
            ("RGBA", "png", 0),
            ("CMYK", "tif", 1),
            ("CMYK", "jpg", 6),
            ("P", "png", 40),
            ("YCbCr", "tif", 3),
        ],
    )
    def test_colour(self, tmp_path: Path, colours: np.ndarray, mode: str, extension: str, tolerance: int) -> None:
        path = tmp_path / f"a.{extension}"
        options: dict[str, Any] = {"quality": 98} if extension == "jpg" else {}
        Image.fromarray(colours).convert(mode).save(path, **options)
        with Image.open(path) as saved:
            assert saved.mode == mode
        difference = load(path).pixels.astype(int) - colours
        assert np.abs(difference).mean() <= tolerance

    @pytest.mark.parametrize("mode", ["L", "LA"])
    def test_grey(self, tmp_path: Path, colours: np.ndarray, mode: str) -> None:
        path = tmp_path / "a.png"
        grey = colours[:, :, 0]
        Image.fromarray(grey).convert(mode).save(path)
        np.testing.assert_array_equal(load(path).pixels, np.repeat(grey[:, :, None], 3, 2))

    def test_alpha_is_dropped_not_blended(self, tmp_path: Path, colours: np.ndarray) -> None:
        alpha = np.full((80, 96, 1), 10, np.uint8)
        Image.fromarray(np.concatenate([colours, alpha], 2)).save(tmp_path / "a.png")
        np.testing.assert_array_equal(load(tmp_path / "a.png").pixels, colours)

    def test_palette_with_transparency(self, tmp_path: Path, colours: np.ndarray) -> None:
        path = tmp_path / "a.png"
        palette = Image.fromarray(colours).quantize(32)
        palette.save(path, transparency=bytes(range(32)))
        np.testing.assert_array_equal(load(path).pixels, np.asarray(palette.convert("RGB")))

    def test_one_bit(self, tmp_path: Path, colours: np.ndarray) -> None:
        bits = colours[:, :, 0] > 128
        Image.fromarray(bits).save(tmp_path / "a.png")
        np.testing.assert_array_equal(load(tmp_path / "a.png").pixels[:, :, 1], bits * np.uint8(255))

    @pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
    def test_16_bit_grey(self, tmp_path: Path, colours: np.ndarray, extension: str) -> None:
        grey = colours[:, :, 0]
        grey = np.where(grey == grey.max(), 255, grey)
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"a.{extension}")
        np.testing.assert_array_equal(load(tmp_path / f"a.{extension}").pixels[:, :, 2], grey)

    def test_float_and_32_bit(self, tmp_path: Path, colours: np.ndarray) -> None:
        grey = np.where(colours[:, :, 0] == colours[:, :, 0].max(), 255, colours[:, :, 0])
        Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "f.tif")
        Image.fromarray(grey.astype(np.int32) * 257).save(tmp_path / "i.tif")
        np.testing.assert_array_equal(load(tmp_path / "f.tif").pixels[:, :, 0], grey)
        np.testing.assert_array_equal(load(tmp_path / "i.tif").pixels[:, :, 0], grey)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535]], np.uint16), [[0, 255]]),
        (np.array([[0, 257 * 7, 60000]], np.uint16), [[0, 7, 233]]),
        (np.array([[0, 2048, 4095]], np.uint16), [[0, 128, 255]]),
        (np.array([[0, 1023]], np.int32), [[0, 255]]),
        (np.array([[3, 200]], np.uint16), [[3, 200]]),
        (np.array([[-5, 0, 131070]], np.int32), [[0, 0, 255]]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [[0, 128, 255]]),
        (np.array([[np.nan, -1.0, 255.0]], np.float32), [[0, 0, 255]]),
        (np.array([[np.inf, 0.0]], np.float32), [[0, 0]]),
        (np.zeros((1, 2), np.uint16), [[0, 0]]),
    ],
)
def test_grey_values_of_any_depth_are_scaled_to_8_bits(values: np.ndarray, expected: list[list[int]]) -> None:
    assert to_8_bit(values).tolist() == expected


class TestErrors:
    def test_missing(self, tmp_path: Path) -> None:
        record = ImageRecord(name="gone.jpg", width_px=10, height_px=10, sha256="")
        with pytest.raises(InputError, match=r"gone\.jpg"):
            load_image(tmp_path, record, SHRUNK)

    def test_truncated(self, photo: Photo) -> None:
        path = photo("cut.jpg", width=400, height=300)
        record = record_of(path)
        path.write_bytes(path.read_bytes()[:4000])
        with pytest.raises(InputError, match=r"cut\.jpg.*truncated"):
            load_image(path.parent, record, SHRUNK)

    def test_another_photo_by_now(self, photo: Photo) -> None:
        record = record_of(photo("a.jpg"))
        path = photo("a.jpg", width=300, height=200)
        with pytest.raises(InputError, match=r"a\.jpg.*changed"):
            load_image(path.parent, record, SHRUNK)


class TestGrey:
    """All pixels of a photo, as they are stored."""

    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("extension", ["png", "tif", "webp", "jpg"])
    def test_the_orientation_is_not_applied(
        self, tmp_path: Path, textured: Textured, orientation: int, extension: str
    ) -> None:
        """Pillow turns a TIFF upright while it decodes it, and nothing else."""
        stored = textured(64, 48)
        options: dict[str, Any] = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(extension, {})
        path = tmp_path / f"a.{extension}"
        Image.fromarray(stored).save(path, exif=oriented(orientation), **options)
        grey = load_grey(tmp_path, record_of(path, orientation=orientation, size=(64, 48)))
        assert grey.dtype == np.float32
        assert grey.shape == (48, 64)
        expected = np.asarray(Image.fromarray(stored).convert("L"), np.float32)
        assert np.abs(grey - expected).max() <= (8 if extension == "jpg" else 0)

    @pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    def test_tiffs_in_every_form(self, tmp_path: Path, textured: Textured, orientation: int, compression: str) -> None:
        stored = textured(64, 48)[:, :, 0]
        path = tmp_path / "a.tif"
        Image.fromarray(stored).save(path, exif=oriented(orientation), compression=compression)
        grey = load_grey(tmp_path, record_of(path, orientation=orientation, size=(64, 48)))
        np.testing.assert_array_equal(grey, stored)

    @pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
    def test_16_bits(self, tmp_path: Path, textured: Textured, extension: str) -> None:
        stored = textured(64, 48)[:, :, 0]
        stored = np.where(stored == stored.max(), 255, stored)
        path = tmp_path / f"a.{extension}"
        Image.fromarray(stored.astype(np.uint16) * 257).save(path)
        np.testing.assert_array_equal(load_grey(tmp_path, record_of(path)), stored)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK"])
    def test_any_mode(self, tmp_path: Path, textured: Textured, mode: str) -> None:
        path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
        photo = Image.fromarray(textured(64, 48)).convert(mode)
        photo.save(path)
        expected = np.asarray(photo.convert("RGB").convert("L"), np.float32)
        np.testing.assert_array_equal(load_grey(tmp_path, record_of(path)), expected)

    def test_a_large_jpeg_is_decoded_whole(self, tmp_path: Path, textured: Textured) -> None:
        path = tmp_path / "a.jpg"
        Image.fromarray(textured(1500, 1100)).save(path, quality=95)
        grey = load_grey(tmp_path, record_of(path))
        with Image.open(path) as whole:
            np.testing.assert_array_equal(grey, np.asarray(whole.convert("L"), np.float32))

    def test_a_photo_that_changed_is_refused(self, photo: Photo) -> None:
        record = record_of(photo("a.jpg"))
        path = photo("a.jpg", width=90, height=120)  # turned
        with pytest.raises(InputError, match=r"a\.jpg.*changed during the run"):
            load_grey(path.parent, record)

    def test_what_cannot_be_read_is_named(self, tmp_path: Path, photo: Photo) -> None:
        with pytest.raises(InputError, match=r"gone\.jpg"):
            load_grey(tmp_path, ImageRecord(name="gone.jpg", width_px=10, height_px=10, sha256=""))
        path = photo("cut.jpg", width=400, height=300)
        record = record_of(path)
        path.write_bytes(path.read_bytes()[:4000])
        with pytest.raises(InputError, match=r"cut\.jpg.*truncated"):
            load_grey(path.parent, record)


def test_a_20000_pixel_panorama_is_shrunk(tmp_path: Path, textured: Textured) -> None:
    path = tmp_path / "panorama.jpg"
    Image.fromarray(textured(20_000, 5_000)[:, :, 0]).save(path)  # 100 Mpx, above the limit at which Pillow warns
    image = load(path, size=(20_000, 5_000))
    assert image.pixels.shape == (256, 1024, 3)
    np.testing.assert_allclose(image.transform.to_photo(np.array([[1024.0, 256.0]])), [[20_000, 5_000]])
