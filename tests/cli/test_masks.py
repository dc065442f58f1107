"""`reconstruct --mask-path` on real photos: nothing lies where a mask says so, whichever way a photo is stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mast3r_sfm.colmap.model import read_model

Command = Callable[..., Any]
TURNED = {0: 6, 3: 8, 5: 3}
"""EXIF orientations of some of the photos."""
UNMASKED = 2
STORED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""What turns an upright photo into its stored pixels."""


def stripes(width: int, height: int) -> NDArray[np.uint8]:
    """An upright mask: its left third is hidden, and one line in twelve, where matches would move into it."""
    values = np.full((height, width), 255, np.uint8)
    values[:, : width // 3] = 0
    values[::12] = 0
    return values


def hidden_keypoints(output: Path, masks: Path) -> dict[str, tuple[int, int]]:
    """By name, keypoints of database.db in masked pixels, and all; of photos with a mask."""
    found = {}
    with pycolmap.Database.open(str(output / "database.db")) as database:
        for image in database.read_all_images():
            path = masks / f"{image.name}.png"
            if path.exists():
                values = np.asarray(Image.open(path))
                xy = np.floor(np.asarray(database.read_keypoints(image.image_id))[:, :2]).astype(int)
                found[image.name] = int((values[xy[:, 1], xy[:, 0]] == 0).sum()), len(xy)
    return found


@pytest.fixture(scope="module")
def masked(scene_photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, of which some are stored turned, photos/masks/ inside, and one photo without a mask."""
    root = tmp_path_factory.mktemp("masked")
    (root / "photos" / "masks").mkdir(parents=True)
    for number, path in enumerate(scene_photos):
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        mask, exif = Image.fromarray(stripes(*photo.size)), Image.Exif()
        if orientation := TURNED.get(number):
            photo, mask = photo.transpose(STORED[orientation]), mask.transpose(STORED[orientation])
            exif[ExifTags.Base.Orientation] = orientation
        photo.save(root / "photos" / path.name, quality=95, exif=exif)
        if number != UNMASKED:
            mask.save(root / "photos" / "masks" / f"{path.name}.png")
    return root


@pytest.fixture(scope="module")
def run_masked(masked: Path, run_command: Command) -> tuple[Path, Any]:
    output = masked / "out"
    result = run_command(
        "reconstruct", masked / "photos", "-o", output, "--mask-path", masked / "photos" / "masks",
        "--features", "both", "--threads", 2, "--model", "xfeat",
    )  # fmt: skip
    assert result.code == 0, result.err
    return output, result


def test_no_keypoint_lies_in_a_masked_pixel(
    run_masked: tuple[Path, Any], masked: Path, scene_photos: list[Path]
) -> None:
    output, result = run_masked
    assert "note: masks: 6 of 7 photos have one" in result.out
    assert "7 of 7 images registered" in result.out
    found = hidden_keypoints(output, masked / "photos" / "masks")
    assert len(found) == len(scene_photos) - 1
    assert {hidden for hidden, _ in found.values()} == {0}
    assert min(count for _, count in found.values()) > 300
    model = read_model(output / "sparse" / "0")
    for name, xy in zip(model.cam_from_world, model.keypoints().values(), strict=True):
        if name in found:
            values = np.asarray(Image.open(masked / "photos" / "masks" / f"{name}.png"))
            column, row = np.floor(xy.astype(np.float32)).astype(int).T
            assert (values[row, column] > 0).all(), name


def test_without_masks_keypoints_lie_there(masked: Path, tmp_path: Path, run_here: Command) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(masked / "photos", photos, ignore=shutil.ignore_patterns("masks"))
    result = run_here(
        "reconstruct", photos, "-o", tmp_path / "out", "--threads", 2, "--model", "xfeat", "--set", "map.refine=false"
    )
    assert result.code == 0, result.err
    found = hidden_keypoints(tmp_path / "out", masked / "photos" / "masks")
    assert min(hidden / count for hidden, count in found.values()) > 0.2


def test_a_changed_mask_is_not_taken_from_the_cache(
    run_masked: tuple[Path, Any], masked: Path, tmp_path: Path, run_here: Command
) -> None:
    output, masks = tmp_path / "out", tmp_path / "masks"
    shutil.copytree(run_masked[0], output)
    shutil.copytree(masked / "photos" / "masks", masks)
    photos = tmp_path / "photos"
    shutil.copytree(masked / "photos", photos, ignore=shutil.ignore_patterns("masks"))
    same = run_here("pairs", photos, "-o", output, "--mask-path", masks, "--model", "xfeat", "--threads", 2, "--json")
    assert same.code == 0, same.err
    assert {stage["stage"]: stage["resumed"] for stage in json.loads(same.out)["stages"]}["encode"] == 1
    (first, *_) = sorted(masks.iterdir())
    Image.fromarray(np.full_like(np.asarray(Image.open(first)), 255)).save(first)
    other = run_here("pairs", photos, "-o", output, "--mask-path", masks, "--model", "xfeat", "--threads", 2, "--json")
    assert {stage["stage"]: stage["resumed"] for stage in json.loads(other.out)["stages"]}["encode"] == 0


def test_masks_that_cannot_be_used_end_the_run(two_photos: Path, tmp_path: Path, run_here: Command) -> None:
    result = run_here("reconstruct", two_photos, "-o", tmp_path / "out", "--mask-path", tmp_path / "masks")
    assert result.code == 2
    assert "masks does not exist" in result.err
    (tmp_path / "masks").mkdir()
    result = run_here("reconstruct", two_photos, "-o", tmp_path / "out", "--mask-path", tmp_path / "masks")
    assert result.code == 2
    assert "no photo has a mask in" in result.err
