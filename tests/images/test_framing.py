"""What a network sees of a photo: sizes that it can take, the centre, undistorted, and the exact way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.images.framing import Framing, frame_photo, photo_from_network, turned_by
from mast3r_sfm.types import Preparation

sides = st.integers(1, 5000)
orientations = st.integers(1, 8)


@st.composite
def preparations(draw: st.DrawFn) -> Preparation:
    """Of models with patches."""
    kind = draw(st.sampled_from(["4:3", "square_ok", "square_crop"]))
    return Preparation(
        size_px=draw(st.integers(64, 1024)),
        patch_px=draw(st.sampled_from([8, 14, 16, 32])),
        square_ok=kind == "square_ok",
        square_crop=kind == "square_crop",
    )


def whole_patches(side_px: int, preparation: Preparation) -> int:
    return side_px // preparation.patch_px * preparation.patch_px


@given(width=sides, height=sides, preparation=preparations())
def test_a_network_can_take_every_size(width: int, height: int, preparation: Preparation) -> None:
    framing = frame_photo((width, height), preparation)
    assert all(side % preparation.patch_px == 0 and side >= preparation.patch_px for side in framing.size)
    assert max(framing.size) == whole_patches(preparation.size_px, preparation)
    left, top, right, bottom = framing.box
    assert 0 <= left < right <= framing.resized[0]
    assert 0 <= top < bottom <= framing.resized[1]
    if preparation.square_crop:
        assert framing.size[0] == framing.size[1]
        assert min(framing.resized) == preparation.size_px


@given(width=sides, height=sides, preparation=preparations())
def test_little_is_cropped(width: int, height: int, preparation: Preparation) -> None:
    framing = frame_photo((width, height), preparation)
    patch = preparation.patch_px
    lost = [whole - kept for whole, kept in zip(framing.resized, framing.size, strict=True)]
    assume(framing.resized[0] != framing.resized[1])
    shorter = int(framing.resized[1] < framing.resized[0])
    assert lost[shorter] < patch
    # Of the long side, no more either, but where the photo becomes a square or is elongated.
    if not preparation.square_crop and max(width, height) / min(width, height) < preparation.size_px / patch:
        assert lost[1 - shorter] < patch
        assert max(framing.resized) == preparation.size_px


@given(side=sides, preparation=preparations())
def test_squares(side: int, preparation: Preparation) -> None:
    width, height = frame_photo((side, side), preparation).size
    assert width == whole_patches(preparation.size_px, preparation)
    if preparation.square_ok or preparation.square_crop:
        assert height == width
    else:
        assert abs(height - 0.75 * width) <= preparation.patch_px / 2
        assert height < width


@given(width=sides, height=sides, preparation=preparations(), orientation=orientations)
def test_the_way_back_is_centred_undistorted_and_inside(
    width: int, height: int, preparation: Preparation, orientation: int
) -> None:
    framing = frame_photo(turned_by(orientation, (width, height)), preparation)
    transform = photo_from_network((width, height), framing, orientation)
    seen = np.array(framing.size, dtype=float)
    centre = transform.to_network(np.array([[width, height]]) / 2)
    assert np.abs(centre - seen / 2).max() <= 0.5 + 1e-9
    scales = np.linalg.norm(transform.matrix[:, :2], axis=0)
    shorter = int(framing.resized[1] < framing.resized[0])
    # The sides of the resized photo are whole numbers, which costs half a pixel of the shorter one.
    assert abs(scales[shorter] / scales[1 - shorter] - 1) <= 0.5 / min(framing.resized) + 1e-12
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * seen
    stored = transform.to_photo(corners)
    assert (stored >= -1e-6).all()
    assert (stored <= np.array([width, height]) + 1e-6).all()
    np.testing.assert_allclose(transform.to_network(stored), corners, atol=1e-6)


@given(width=sides, height=sides, preparation=preparations())
def test_portrait_is_landscape_on_its_side(width: int, height: int, preparation: Preparation) -> None:
    landscape = frame_photo((width, height), preparation)
    portrait = frame_photo((height, width), preparation)
    assert portrait.resized == landscape.resized[::-1]
    assert portrait.resample == landscape.resample
    # What is square after the resize is cropped to landscape, whatever it was before.
    assume(landscape.resized[0] != landscape.resized[1] or preparation.square_ok or preparation.square_crop)
    assert portrait.size == landscape.size[::-1]
    assert portrait.offset == landscape.offset[::-1]


@pytest.mark.parametrize(
    ("upright", "resized", "offset", "size", "filter_name"),
    [
        ((4000, 3000), (512, 384), (0, 0), (512, 384), "LANCZOS"),
        ((3000, 4000), (384, 512), (0, 0), (384, 512), "LANCZOS"),
        ((4000, 2250), (512, 288), (0, 0), (512, 288), "LANCZOS"),
        ((4000, 2667), (512, 341), (0, 2), (512, 336), "LANCZOS"),
        ((320, 240), (512, 384), (0, 0), (512, 384), "BICUBIC"),
        ((512, 300), (512, 300), (0, 6), (512, 288), "BICUBIC"),
        ((1000, 1000), (512, 512), (0, 64), (512, 384), "LANCZOS"),
        ((16_400, 512), (512, 16), (0, 0), (512, 16), "LANCZOS"),  # 32:1, the last that fits
        ((20_000, 500), (640, 16), (64, 0), (512, 16), "LANCZOS"),  # 40:1
        ((8, 800), (16, 1600), (0, 544), (16, 512), "BICUBIC"),
    ],
)
def test_sizes_of_mast3r(
    upright: tuple[int, int], resized: tuple[int, int], offset: tuple[int, int], size: tuple[int, int], filter_name: str
) -> None:
    framing = frame_photo(upright, Preparation(size_px=512, patch_px=16))
    assert (framing.resized, framing.offset, framing.size) == (resized, offset, size)
    assert framing.resample.name == filter_name


@pytest.mark.parametrize(
    ("patches", "rows"), [(1, 1), (2, 1), (3, 2), (4, 3), (5, 4), (6, 4), (7, 5), (8, 6), (21, 16), (32, 24)]
)
def test_squares_become_the_nearest_to_three_quarters(patches: int, rows: int) -> None:
    preparation = Preparation(size_px=16 * patches, patch_px=16)
    assert frame_photo((900, 900), preparation).size == (16 * patches, 16 * rows)


@given(width=st.integers(1, 30_000), height=st.integers(1, 30_000), limit=st.integers(1, 4096))
def test_without_patches_photos_are_only_shrunk(width: int, height: int, limit: int) -> None:
    framing = frame_photo((width, height), Preparation(size_px=limit))
    assert max(framing.size) == min(limit, max(width, height))
    assert min(framing.size) >= 1
    assert (framing.size, framing.offset) == (framing.resized, (0, 0))


@given(
    width=st.integers(1, 30_000), height=st.integers(1, 30_000), limit=st.integers(64, 4096), orientation=orientations
)
def test_without_a_crop_corners_map_to_corners(width: int, height: int, limit: int, orientation: int) -> None:
    framing = frame_photo(turned_by(orientation, (width, height)), Preparation(size_px=limit))
    transform = photo_from_network((width, height), framing, orientation)
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * np.array(framing.size, dtype=float)
    stored = transform.to_photo(corners)
    assert {tuple(corner) for corner in np.rint(stored).tolist()} == {(0, 0), (width, 0), (0, height), (width, height)}
    np.testing.assert_allclose(transform.to_network(stored), corners, atol=1e-6)
    mirrored = orientation in (2, 4, 5, 7)
    assert (np.linalg.det(transform.matrix[:, :2]) < 0) == mirrored


@given(width=st.integers(1, 60), height=st.integers(1, 60), orientation=orientations, data=st.data())
def test_every_pixel_comes_from_the_stored_pixel_the_transform_names(
    width: int, height: int, orientation: int, data: st.DataObject
) -> None:
    from mast3r_sfm.images.loading import _UPRIGHT

    index = np.arange(width * height, dtype=np.int32).reshape(height, width)
    stored = Image.fromarray(index)
    upright = stored if orientation == 1 else stored.transpose(_UPRIGHT[orientation])
    offset = (data.draw(st.integers(0, upright.width - 1)), data.draw(st.integers(0, upright.height - 1)))
    size = (
        data.draw(st.integers(1, upright.width - offset[0])),
        data.draw(st.integers(1, upright.height - offset[1])),
    )
    framing = Framing(resized=upright.size, resample=Image.Resampling.LANCZOS, offset=offset, size=size)
    seen = np.asarray(upright.crop(framing.box))
    assert seen.shape == size[::-1]
    row, column = data.draw(st.integers(0, size[1] - 1)), data.draw(st.integers(0, size[0] - 1))
    transform = photo_from_network((width, height), framing, orientation)
    x, y = transform.to_photo(np.array([[column + 0.5, row + 0.5]]))[0]
    assert seen[row, column] == index[int(y), int(x)]
    assert (x % 1, y % 1) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("size_px", "patch_px", "square_ok", "square_crop", "message"),
    [
        (0, 0, False, False, "patches of 0 px do not fit into images of 0 px"),
        (512, -1, False, False, "patches of -1 px"),
        (15, 16, False, False, "patches of 16 px do not fit into images of 15 px"),
        (512, 0, True, False, "for models with patches"),
        (224, 0, False, True, "for models with patches"),
    ],
)
def test_impossible_preparations(size_px: int, patch_px: int, square_ok: bool, square_crop: bool, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Preparation(size_px=size_px, patch_px=patch_px, square_ok=square_ok, square_crop=square_crop)
