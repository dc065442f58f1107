"""Parity of the preparation of images with preprocess.json (sizes) and preprocess.npz (bytes).

The reference gives some images sizes that its own network cannot take. There, what is compared is our own rule, as
docs/design.md states it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mast3r_sfm.images.framing import Framing, frame_photo, photo_from_network
from mast3r_sfm.images.loading import load_image
from mast3r_sfm.types import Float64, ImageRecord, Preparation

PATCH_PX = 16  # of preprocess.npz, which does not name it
Bytes = NDArray[np.uint8]


def _preparation(size: int, square_ok: bool, patch_px: int) -> Preparation:
    return Preparation(size_px=size, patch_px=patch_px, square_ok=square_ok, square_crop=size == 224)


def _framing(row: dict[str, Any]) -> Framing:
    return frame_photo((row["W"], row["H"]), _preparation(row["size"], row["square_ok"], row["patch_size"]))


def _usable(row: dict[str, Any]) -> bool:
    return all(side > 0 and side % row["patch_size"] == 0 for side in row["out_WH"])


@pytest.fixture(scope="module")
def rows(golden_dir: Path) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = json.loads((golden_dir / "preprocess.json").read_text())["rows"]
    assert len(table) == 310
    return table


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Any]:
    with np.load(golden_dir / "preprocess.npz") as file:
        return {name: file[name] for name in file.files}


def test_every_usable_row(rows: list[dict[str, Any]]) -> None:
    usable = [row for row in rows if _usable(row)]
    assert len(usable) == 297
    for row in usable:
        framing = _framing(row)
        assert list(framing.resized) == row["resize_to"], row
        assert framing.resample.name.lower() == row["filter"], row
        assert [float(side) for side in framing.box] == row["crop_box_float"], row
        assert list(framing.size) == row["out_WH"], row
        assert list(framing.size[::-1]) == row["true_shape_HW"], row


def test_the_way_back_of_every_usable_row(rows: list[dict[str, Any]]) -> None:
    for row in filter(_usable, rows):
        scale, crop = np.array(row["scale_xy"]), np.array(row["crop_offset_xy"])
        corners: Float64 = np.array([[0.0, 0.0], [0.5, 0.5], row["out_WH"]])
        transform = photo_from_network((row["W"], row["H"]), _framing(row), 1)
        np.testing.assert_allclose(transform.to_photo(corners), (corners + crop) / scale, rtol=1e-12)


def test_rows_that_only_we_can_use(rows: list[dict[str, Any]]) -> None:
    unusable = [row for row in rows if not _usable(row)]
    elongated = [row for row in unusable if 0 in row["out_WH"]]
    assert (len(unusable), len(elongated)) == (13, 5)
    for row in elongated:
        framing, patch = _framing(row), row["patch_size"]
        landscape = row["W"] > row["H"]
        longer, shorter = max(row["W"], row["H"]), min(row["W"], row["H"])
        resized, size = (round(longer * patch / shorter), patch), (row["size"], patch)
        assert framing.resized == (resized if landscape else resized[::-1])
        assert framing.size == (size if landscape else size[::-1])
        assert framing.resample.name.lower() == row["filter"]
        for border, left, cut in zip(framing.offset, framing.size, framing.resized, strict=True):
            assert border == (cut - left) // 2  # the centre
    for row in unusable:
        if row not in elongated:
            framing = _framing(row)
            assert (row["resize_to"], row["out_WH"]) == ([336, 336], [336, 252])
            assert (framing.resized, framing.size, framing.offset) == ((336, 336), (336, 256), (0, 40))
            assert framing.resample.name.lower() == row["filter"]


def _load(folder: Path, image: Image.Image, preparation: Preparation, orientation: int = 1) -> Bytes:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    image.save(folder / "a.png", exif=tags)
    record = ImageRecord(name="a.png", width_px=image.width, height_px=image.height, sha256="", orientation=orientation)
    return load_image(folder, record, preparation).pixels


def _load_named(golden: dict[str, Any], name: str, folder: Path) -> Bytes:
    size, square_ok = golden[f"{name}/size_squareok"].tolist()
    return _load(folder, Image.fromarray(golden[f"{name}/in_u8"]), _preparation(size, bool(square_ok), PATCH_PX))


SAME = ["down_lanczos", "up_bicubic", "down_512", "square_ok", "s224", "equal_size"]


@pytest.mark.parametrize("name", SAME)
def test_pixels_are_equal_to_the_byte(golden: dict[str, Any], name: str, tmp_path: Path) -> None:
    pixels = _load_named(golden, name, tmp_path)
    assert list(pixels.shape[:2]) == golden[f"{name}/true_shape"].tolist()
    np.testing.assert_array_equal(pixels, golden[f"{name}/out_u8"])


def test_a_square_of_six_patches_loses_half_a_patch_more(golden: dict[str, Any], tmp_path: Path) -> None:
    reference = golden["square/out_u8"]
    assert reference.shape == (72, 96, 3)  # four and a half patches
    np.testing.assert_array_equal(_load_named(golden, "square", tmp_path), reference[4:68])


def test_nothing_is_left_out(golden: dict[str, Any]) -> None:
    compared = {*SAME, "square", "exif", "mode"}
    assert {name.split("/")[0] for name in golden} == compared


@pytest.mark.parametrize("orientation", [1, 2, 3, 5, 6, 8])
def test_exif_is_applied_before_the_resize(golden: dict[str, Any], orientation: int, tmp_path: Path) -> None:
    photo = Image.fromarray(golden["exif/in_u8"])
    pixels = _load(tmp_path, photo, _preparation(64, False, PATCH_PX), orientation)
    np.testing.assert_array_equal(pixels, golden[f"exif/orientation{orientation}/out_u8"])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_modes(golden: dict[str, Any], mode: str, tmp_path: Path) -> None:
    photo = Image.fromarray(golden[f"mode/{mode}/in"])
    photo = photo.convert("P") if mode == "P" else photo  # stored as RGB, of colours that survive it
    assert photo.mode == mode
    pixels = _load(tmp_path, photo, _preparation(64, False, PATCH_PX))
    np.testing.assert_array_equal(pixels, golden[f"mode/{mode}/out_u8"])
