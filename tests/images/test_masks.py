"""Masks: where they are looked for, what they hide, and what is wrong with those that cannot be used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mast3r_sfm.config import PrepareConfig
from mast3r_sfm.errors import ConfigError, InputError
from mast3r_sfm.images.listing import list_images
from mast3r_sfm.images.masks import Masks, VisibleTokens, read_mask
from mast3r_sfm.types import Encoding, ImageRecord, ImageSet, PixelMask, PixelTransform

Photo = Callable[..., Path]


def half(width: int = 120, height: int = 90) -> NDArray[np.uint8]:
    """The left half is hidden."""
    values = np.zeros((height, width), np.uint8)
    values[:, width // 2 :] = 255
    return values


def put(path: Path, values: NDArray[Any], mode: str | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def listing(root: Path, recorder: Any, masks: Path, **settings: Any) -> ImageSet:
    return list_images(root, PrepareConfig(mask_path=str(masks), **settings), recorder)


@given(arrays(np.bool_, st.tuples(st.integers(1, 20), st.integers(1, 40))), st.integers(0, 2**32 - 1))
def test_a_pixel_mask_tells_what_the_array_said(usable: NDArray[np.bool_], seed: int) -> None:
    height, width = usable.shape
    xy = np.random.default_rng(seed).uniform(0, 1, (50, 2)) * [width, height]
    column, row = np.floor(xy.astype(np.float32)).astype(int).clip(0, [width - 1, height - 1]).T
    np.testing.assert_array_equal(PixelMask.of(usable).allows(xy), usable[row, column])


def test_pixels_outside_go_with_the_border_and_rounding_is_that_of_the_database() -> None:
    mask = PixelMask.of(np.array([[True, False, True]]))
    xy = np.array([[-5.0, 0.5], [9.0, 3.0], [1.0, 0.2], [0.99999, 0.2], [np.nextafter(1.0, 0.0), 0.2]])
    assert mask.allows(xy).tolist() == [True, True, False, True, False]
    assert mask.allows(np.zeros((0, 2))).tolist() == []


def test_masks_are_found_by_either_name_and_colmaps_comes_first(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    for seed, name in enumerate(["a/b.jpg", "a/c.jpg", "d.jpg", "e.jpg"]):
        photo(f"photos/{name}", seed=seed)
    masks = tmp_path / "masks"
    put(masks / "a/b.jpg.png", half())
    put(masks / "a/b.png", np.zeros((3, 3), np.uint8))
    put(masks / "a/c.png", half())
    put(masks / "d.jpg.png", half())
    images = listing(tmp_path / "photos", recorder, masks)
    assert [record.mask for record in images.records] == ["a/b.jpg.png", "a/c.png", "d.jpg.png", None]
    assert [bool(record.mask_sha256) for record in images.records] == [True, True, True, False]
    found = Masks.of(images, PrepareConfig(mask_path=str(masks)))
    assert found is not None
    xy = np.array([[10.0, 10.0], [70.0, 10.0]])
    assert found.usable(0, xy).tolist() == [False, True]
    assert found.usable(3, xy).tolist() == [True, True]


def test_how_many_have_masks_is_said(tmp_path: Path, photo: Photo, recorder: Any, monkeypatch: Any) -> None:
    notes: list[str] = []
    monkeypatch.setattr(recorder, "note", notes.append)
    for seed in range(3):
        photo(f"photos/{seed}.jpg", seed=seed)
    put(tmp_path / "masks/1.jpg.png", half())
    listing(tmp_path / "photos", recorder, tmp_path / "masks")
    assert notes == ["masks: 1 of 3 photos have one"]


def test_masks_inside_the_photos_folder_are_no_photos(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    for seed in range(2):
        photo(f"photos/{seed}.jpg", seed=seed)
        photo(f"photos/masks/{seed}.jpg.png", seed=10 + seed)
    (tmp_path / "photos" / "link").symlink_to("masks")
    assert len(list_images(tmp_path / "photos", PrepareConfig(), recorder)) == 4
    images = listing(tmp_path / "photos", recorder, tmp_path / "photos" / "masks")
    assert images.names == ("0.jpg", "1.jpg")
    assert images.left_out == ()


def test_a_photo_that_is_hidden_as_a_whole_is_left_out(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    for seed in range(3):
        photo(f"photos/{seed}.jpg", seed=seed)
    put(tmp_path / "masks/1.jpg.png", np.zeros((90, 120), np.uint8))
    images = listing(tmp_path / "photos", recorder, tmp_path / "masks")
    assert images.names == ("0.jpg", "2.jpg")
    assert [(entry.name, entry.reason) for entry in images.left_out] == [("1.jpg", "its mask hides all of it")]
    put(tmp_path / "masks/2.jpg.png", np.zeros((90, 120), np.uint8))
    with pytest.raises(InputError, match=r"only 0\.jpg(.|\n)*its mask hides all of it"):
        listing(tmp_path / "photos", recorder, tmp_path / "masks")


def test_masks_that_belong_to_no_photo_end_the_run(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    for seed in range(2):
        photo(f"photos/{seed}.jpg", seed=seed)
    put(tmp_path / "masks/other.jpg.png", half())
    with pytest.raises(InputError, match=r"no photo has a mask in .*looked for 0\.jpg\.png, 0\.png"):
        listing(tmp_path / "photos", recorder, tmp_path / "masks")


@pytest.mark.parametrize(("name", "error", "part"), [
    ("nowhere", InputError, "does not exist"),
    ("photos/0.jpg", InputError, "is not a folder"),
    ("photos", ConfigError, "photos' own folder"),
])  # fmt: skip
def test_folders_that_hold_no_masks(
    name: str, error: type[Exception], part: str, tmp_path: Path, photo: Photo, recorder: Any
) -> None:
    photo("photos/0.jpg")
    with pytest.raises(error, match=part):
        listing(tmp_path / "photos", recorder, tmp_path / name)


def test_a_mask_has_the_size_of_the_stored_photo(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for seed in range(2):
        photo(f"photos/{seed}.jpg", seed=seed, exif=exif)
    mask = put(tmp_path / "masks/0.jpg.png", half(90, 120))
    with pytest.raises(InputError, match=r"has 90×120 pixels.* has 120×90.*as the photo is stored, not as EXIF"):
        listing(tmp_path / "photos", recorder, tmp_path / "masks")
    put(mask, half(60, 45))
    with pytest.raises(InputError, match=r"60×45 pixels, and its photo 0\.jpg has 120×90; they must be equal$"):
        listing(tmp_path / "photos", recorder, tmp_path / "masks")
    put(mask, half())
    assert listing(tmp_path / "photos", recorder, tmp_path / "masks").records[0].mask == "0.jpg.png"


def test_a_broken_mask_is_named(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    for seed in range(2):
        photo(f"photos/{seed}.jpg", seed=seed)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "1.jpg.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"cannot read the mask .*1\.jpg\.png"):
        listing(tmp_path / "photos", recorder, tmp_path / "masks")


def record(name: str = "a.jpg") -> ImageRecord:
    return ImageRecord(name=name, width_px=12, height_px=9, sha256="0" * 64, mask=f"{name}.png")


@pytest.mark.parametrize("mode", [None, "1", "RGB", "RGBA", "LA", "P"])
def test_masks_of_any_mode(mode: str | None, tmp_path: Path) -> None:
    values = half(12, 9) // 85
    if mode == "1":
        values = half(12, 9)
    put(tmp_path / "a.jpg.png", values, mode)
    mask = read_mask(tmp_path, record())
    columns = np.arange(12) + 0.5
    assert mask.allows(np.stack([columns, np.full(12, 4.5)], axis=1)).tolist() == [False] * 6 + [True] * 6


def test_deep_masks_and_alpha(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg.png", (half(12, 9) // 255).astype(np.uint16))
    xy = np.array([[1.5, 1.5], [8.5, 1.5]])
    assert read_mask(tmp_path, record()).allows(xy).tolist() == [False, True]
    opaque = np.zeros((9, 12, 4), np.uint8)
    opaque[..., 3] = 255
    opaque[:, 6:, 2] = 1
    put(tmp_path / "a.jpg.png", opaque)
    assert read_mask(tmp_path, record()).allows(xy).tolist() == [False, True]


def test_changed_masks_are_other_records(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    for seed in range(2):
        photo(f"photos/{seed}.jpg", seed=seed)
    put(tmp_path / "masks/0.jpg.png", half())
    before = listing(tmp_path / "photos", recorder, tmp_path / "masks").records
    shutil.copytree(tmp_path / "masks", tmp_path / "elsewhere")
    assert listing(tmp_path / "photos", recorder, tmp_path / "elsewhere").records == before
    put(tmp_path / "masks/0.jpg.png", 255 - half())
    assert listing(tmp_path / "photos", recorder, tmp_path / "masks").records != before


def test_retrieval_sees_visible_tokens_alone() -> None:
    encoding = Encoding(
        tokens=np.arange(8, dtype=np.float16).reshape(4, 2),
        xy=np.array([[1, 1], [5, 1], [1, 5], [5, 5]], np.float32),
        attention=np.array([4, 3, 2, 1], np.float32),
        transform=PixelTransform(matrix=np.eye(2, 3)),
        network_size=(8, 8),
    )
    asked = []

    def usable(image: int, xy: NDArray[np.float64]) -> NDArray[np.bool_]:
        asked.append(image)
        return xy[:, 0] > 3

    visible = VisibleTokens([encoding] * 3, usable)
    assert len(visible) == 3
    assert visible[-1].attention.tolist() == [3, 1]
    assert [len(some.tokens) for some in visible[1:]] == [2, 2]
    assert [some.xy.tolist() for some in visible] == [[[5, 1], [5, 5]]] * 3
    assert asked == [2, 1, 2, 0, 1, 2]
