"""COLMAP's SIFT: where its keypoints lie in the photo, what their descriptors are, and how many are kept."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image
from scipy.spatial import cKDTree

from mast3r_sfm.images.loading import load_image
from mast3r_sfm.models.sift import SiftModel
from mast3r_sfm.types import Encoding, Float64, ImageRecord, LoadedImage, PixelMask, PixelTransform, Preparation


def places(width: int, height: int, spacing: int) -> Float64:
    """[K, 2] sub-pixel places on a loose grid, in COLMAP's pixels."""
    rng = np.random.default_rng(4)
    columns, rows = np.meshgrid(
        np.arange(spacing, width - spacing + 1, spacing), np.arange(spacing, height - spacing + 1, spacing)
    )
    grid = np.stack([columns.ravel(), rows.ravel()], axis=1).astype(np.float64)
    return grid + rng.uniform(-0.1, 0.1, grid.shape) * spacing


def blobs(width: int, height: int, centres: Float64, sigma: float) -> NDArray[np.uint8]:
    """Round bright spots on grey. The centre of the top-left pixel is (0.5, 0.5)."""
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    spots = np.zeros((height, width))
    for x, y in centres:
        spots += np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))
    grey = (60 + 150 * spots).round().clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def texture(seed: int = 0, size: tuple[int, int] = (320, 240)) -> NDArray[np.uint8]:
    """Full of detail of all sizes."""
    rng = np.random.default_rng(seed)
    whole = np.zeros((size[1], size[0]))
    for cell in (4, 8, 16, 32):
        coarse = Image.fromarray(rng.uniform(0, 60, (size[1] // cell, size[0] // cell)).astype(np.float32))
        whole += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
    return np.repeat(whole.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def loaded(pixels: NDArray[np.uint8], matrix: Float64 | None = None) -> LoadedImage:
    height, width = pixels.shape[:2]
    record = ImageRecord(name="photo.png", width_px=width, height_px=height, sha256="0" * 64)
    return LoadedImage(
        record=record, pixels=pixels, transform=PixelTransform(matrix=np.eye(2, 3) if matrix is None else matrix)
    )


def encode(pixels: NDArray[np.uint8], matrix: Float64 | None = None, keypoints: int = 4096) -> Encoding:
    (encoding,) = SiftModel(keypoints=keypoints).encode([loaded(pixels, matrix)])
    return encoding


def errors(encoding: Encoding, centres: Float64) -> Float64:
    """[K, 2] by which the keypoint nearest to each place misses it."""
    return encoding.xy[cKDTree(encoding.xy).query(centres)[1]] - centres


def assert_found(encoding: Encoding, centres: Float64, within_px: float) -> None:
    """All of them, without a common shift: half a pixel of another convention would show."""
    assert len(centres) >= 20
    missed = errors(encoding, centres)
    assert np.abs(missed).max() < within_px
    assert np.abs(missed.mean(axis=0)).max() < within_px / 3


@pytest.mark.parametrize("sigma", [2.0, 3.0, 5.0])
def test_keypoints_lie_on_the_spots(sigma: float) -> None:
    centres = places(320, 240, 40)
    assert_found(encode(blobs(320, 240, centres, sigma), None), centres, 0.1)


def test_the_scale_of_a_spot_is_its_size_in_photo_pixels() -> None:
    centres = places(320, 240, 40)
    scales = []
    for sigma, zoom in ((2.0, 1.0), (4.0, 1.0), (2.0, 3.0)):
        encoding = encode(blobs(320, 240, centres, sigma), np.array([[zoom, 0.0, 0.0], [0.0, zoom, 0.0]]))
        nearest = cKDTree(encoding.xy).query(zoom * centres)[1]
        scales.append(np.median(encoding.attention[nearest]))
    assert scales[1] / scales[0] == pytest.approx(2, rel=0.15)
    assert scales[2] / scales[0] == pytest.approx(3, rel=1e-4)


def test_keypoints_are_given_in_pixels_of_the_photo() -> None:
    centres = places(320, 240, 40)
    pixels = blobs(320, 240, centres, 2.0)
    matrix = np.array([[0.0, 3.0, 5.0], [-3.0, 0.0, 960.0]])  # the photo lies on its side
    plain, turned = encode(pixels), encode(pixels, matrix)
    np.testing.assert_allclose(turned.xy, plain.xy @ matrix[:, :2].T + matrix[:, 2], atol=1e-3)
    np.testing.assert_array_equal(turned.tokens, plain.tokens)
    np.testing.assert_array_equal(turned.transform.matrix, matrix)
    assert turned.network_size == (320, 240)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_large_photo_in_every_orientation(tmp_path: Path, orientation: int) -> None:
    """Shrunk by three and turned for the detector; keypoints are those of the stored pixels."""
    width, height = 960, 720
    centres = places(width, height, 96)
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    Image.fromarray(blobs(width, height, centres, 9.0)).save(tmp_path / "photo.png", exif=tags)
    record = ImageRecord(name="photo.png", width_px=width, height_px=height, sha256="", orientation=orientation)
    model = SiftModel(size_px=320)
    assert model.preparation == Preparation(size_px=320)
    image = load_image(tmp_path, record, model.preparation)
    assert max(image.pixels.shape[:2]) == 320
    (encoding,) = model.encode([image])
    assert_found(encoding, centres, 0.3)  # a tenth of what the detector sees as a pixel
    assert encoding.network_size == ((320, 240) if orientation in (1, 3) else (240, 320))


def test_descriptors_are_unit_vectors() -> None:
    encoding = encode(texture())
    count = len(encoding.xy)
    assert 200 < count < 4096
    assert encoding.tokens.shape == (count, 128)
    assert encoding.attention.shape == (count,)
    assert (encoding.tokens.dtype, encoding.xy.dtype, encoding.attention.dtype) == (np.float16, np.float32, np.float32)
    np.testing.assert_allclose(np.linalg.norm(encoding.tokens.astype(np.float64), axis=1), 1, atol=2e-3)
    assert (encoding.tokens >= 0).all()  # of histograms
    assert (encoding.xy >= 0).all()
    assert (encoding.xy <= [320, 240]).all()


def test_descriptors_know_their_places_again() -> None:
    """In the picture shifted by whole pixels; others are clearly less alike."""
    photo, shift = texture(size=(352, 272)), np.array([24, 16])
    here = encode(np.ascontiguousarray(photo[:240, :320]))
    there = encode(np.ascontiguousarray(photo[shift[1] : shift[1] + 240, shift[0] : shift[0] + 320]))
    similarity = here.tokens.astype(np.float32) @ there.tokens.astype(np.float32).T
    best = similarity.argmax(axis=1)
    error = np.linalg.norm(here.xy - shift - there.xy[best], axis=1)
    sure = similarity.max(axis=1) > 0.95
    assert sure.sum() > 100
    assert (error[sure] < 0.5).mean() > 0.9
    assert np.median(similarity) < SiftModel.min_similarity < np.median(similarity.max(axis=1))


def test_only_so_many_are_kept_those_of_the_largest_scale() -> None:
    everything = encode(texture())
    assert (np.diff(everything.attention) <= 0).all()
    for keypoints in (20, 100):
        few = encode(texture(), keypoints=keypoints)
        assert len(few.xy) == keypoints
        np.testing.assert_array_equal(few.xy, everything.xy[:keypoints])
        np.testing.assert_array_equal(few.attention, everything.attention[:keypoints])
        np.testing.assert_array_equal(few.tokens, everything.tokens[:keypoints])
    assert everything.attention[0] > 2 * everything.attention[100]


@pytest.mark.parametrize("size", [(320, 240), (16, 16), (1, 1), (400, 3)])
def test_an_image_without_texture_has_no_keypoints(size: tuple[int, int]) -> None:
    encoding = encode(np.full((*size[::-1], 3), 127, np.uint8))
    assert encoding.tokens.shape == (0, 128)
    assert encoding.xy.shape == (0, 2)
    assert encoding.attention.shape == (0,)
    assert encoding.network_size == size


def test_the_same_image_has_the_same_keypoints_in_any_company() -> None:
    model = SiftModel()
    images = [loaded(texture(seed)) for seed in (0, 1, 0)]
    one, other, again = model.encode(images)
    for name in ("tokens", "xy", "attention"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(one, name), getattr(SiftModel().encode(images[:1])[0], name))
    assert one.xy.shape != other.xy.shape or not np.array_equal(one.xy, other.xy)
    assert model.encode([]) == []
    masked = replace(images[1], mask=PixelMask.of(np.ones(images[1].pixels.shape[:2], np.bool_)))
    for mixed in SiftModel(threads=2).encode([images[0], masked, images[0]])[::2]:
        np.testing.assert_array_equal(mixed.tokens, one.tokens)


def test_what_changes_keypoints_changes_the_fingerprint() -> None:
    models = [SiftModel(), SiftModel(keypoints=100), SiftModel(keypoints=200)]
    assert all(one.fingerprint != two.fingerprint for one, two in pairwise(models))
    assert SiftModel().fingerprint == models[0].fingerprint
    # The size stands in the preparation, which enters the keys by itself.
    assert SiftModel(size_px=512).preparation != models[0].preparation
    assert SiftModel(threads=2).fingerprint == models[0].fingerprint


def test_a_mask_hides_keypoints_before_the_largest_are_chosen() -> None:
    pixels = texture(seed=3)
    usable = np.zeros(pixels.shape[:2], np.bool_)
    usable[100:, ::2] = True
    mask = PixelMask.of(usable)
    everything = encode(pixels, keypoints=1 << 20)
    seen = mask.allows(everything.xy.astype(np.float64))
    assert 60 < seen.sum() < 0.5 * len(seen)
    (masked,) = SiftModel(keypoints=50).encode([replace(loaded(pixels), mask=mask)])
    np.testing.assert_array_equal(masked.xy, everything.xy[seen][:50])
    np.testing.assert_array_equal(masked.tokens, everything.tokens[seen][:50])
    assert mask.allows(encode(pixels, keypoints=50).xy.astype(np.float64)).sum() < 40
