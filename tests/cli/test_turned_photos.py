"""Photos that EXIF turns: the model is in the pixels of the stored files, as COLMAP reads them, with right colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
from PIL import ExifTags, Image

from mast3r_sfm.colmap.model import ColmapModel, read_model
from mast3r_sfm.evaluation.pairs import measure_pairs
from mast3r_sfm.synthetic.render import View, make_views
from mast3r_sfm.types import Float64
from tests.colmap_files import read_stored
from tests.loaders import ANY_LENS, UNDISTORTED, broken, broken_rules, keypoints_outside

Command = Callable[..., Any]
WIDTH, HEIGHT = 480, 360
TURNED = {0: 1, 1: 6, 2: 8, 3: 6, 4: 3, 5: 1, 6: 1, 7: 8}
"""EXIF orientations. Four photos of either size: a camera of fewer keeps no distortion."""
STORED = {
    1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip
"""What turns an upright photo into its stored pixels."""
ANGLE = {1: 0.0, 3: 180.0, 6: -90.0, 8: 90.0}
"""Degrees about the viewing axis (x to y) that turn the upright camera into that of the stored pixels."""


def stored_from_upright(orientation: int) -> Float64:
    angle = np.deg2rad(ANGLE[orientation])
    return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])


@pytest.fixture(scope="module")
def views() -> dict[str, View]:
    return {
        name.replace(".jpg", ".png"): view
        for name, view in make_views("facade", len(TURNED), width_px=WIDTH, height_px=HEIGHT, seed=3).items()
    }


@pytest.fixture(scope="module")
def photos(views: dict[str, View], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turned")
    for number, (name, view) in enumerate(sorted(views.items())):
        photo, exif = Image.fromarray(view.image), Image.Exif()
        exif[ExifTags.Base.Orientation] = TURNED[number]
        transpose = STORED[TURNED[number]]
        (photo if transpose is None else photo.transpose(transpose)).save(folder / name, exif=exif)
    return folder


@pytest.fixture(scope="module")
def output(photos: Path, tmp_path_factory: pytest.TempPathFactory, run_command: Command) -> Path:
    folder = tmp_path_factory.mktemp("out") / "out"
    result = run_command("reconstruct", photos, "-o", folder, "--threads", 2, "--model", "xfeat")
    assert result.code == 0, result.err
    assert f"{len(TURNED)} of {len(TURNED)} images registered" in result.out
    return folder


@pytest.fixture(scope="module")
def model(output: Path) -> ColmapModel:
    return read_model(output / "sparse" / "0")


def test_cameras_have_the_size_of_the_stored_files(model: ColmapModel, photos: Path) -> None:
    for name, camera in model.cameras.items():
        bitmap = pycolmap.Bitmap.read(photos / name, True)
        assert (camera.width_px, camera.height_px) == (bitmap.width, bitmap.height)
    sizes = {(camera.width_px, camera.height_px) for camera in model.cameras.values()}
    assert sizes == {(WIDTH, HEIGHT), (HEIGHT, WIDTH)}


def test_poses_are_those_of_the_stored_cameras(model: ColmapModel, views: dict[str, View]) -> None:
    truth = {
        name: stored_from_upright(TURNED[number]) @ view.cam_from_world
        for number, (name, view) in enumerate(sorted(views.items()))
    }
    errors = measure_pairs([model.cam_from_world], truth, sorted(truth))
    assert errors.error_deg.max() < 1.0
    upright = measure_pairs(
        [model.cam_from_world], {name: view.cam_from_world for name, view in views.items()}, sorted(truth)
    )
    assert upright.error_deg.max() > 80


def test_observations_lie_where_the_stored_photo_shows_the_point(model: ColmapModel, views: dict[str, View]) -> None:
    """By the truth: what two stored photos show at the pixels of one track is one place of the scene."""
    tracks, places = model.tracks(), {}
    for number, view in enumerate(view for _, view in sorted(views.items())):
        mine = tracks.image == number
        across, down = (tracks.xy[mine] / np.array(model.size(number))).T
        # The place in the upright photo, by what the EXIF standard says of the orientation.
        upright = {
            1: (across, down), 3: (1 - across, 1 - down), 6: (1 - down, across), 8: (down, 1 - across),
        }[TURNED[number]]  # fmt: skip
        column, row = np.floor(np.stack(upright) * [[WIDTH], [HEIGHT]]).astype(int)
        for point, place in zip(tracks.point[mine], view.points_world[row, column], strict=True):
            places.setdefault(int(point), []).append(place)
    size = np.ptp(np.concatenate([view.points_world.reshape(-1, 3) for view in views.values()]), axis=0).max()
    spread = np.array([np.ptp(np.array(some), axis=0).max() for some in places.values()])
    assert len(spread) > 300
    assert np.median(spread) < 0.005 * size
    assert np.quantile(spread, 0.9) < 0.02 * size


def test_points_have_the_colours_of_the_photos(output: Path, photos: Path) -> None:
    stored = read_stored(output / "sparse" / "0")
    pixels = {image.name: np.asarray(Image.open(photos / image.name)) for image in stored.images.values()}
    off = []
    for point in stored.points.values():
        seen = []
        for number, keypoint in point.track:
            image = stored.images[number]
            column, row = np.floor(image.xy[keypoint]).astype(int)
            seen.append(pixels[image.name][row, column])
        off.append(np.abs(np.mean(seen, axis=0) - point.rgb).max())
    assert np.median(off) < 8
    assert np.ptp([point.rgb for point in stored.points.values()], axis=0).min() > 50


def test_loaders_read_turned_photos(output: Path, photos: Path, tmp_path: Path) -> None:
    stored = read_stored(output / "sparse" / "0")
    assert list(broken(stored, photos, ANY_LENS)) == []
    assert keypoints_outside(stored) == []
    pycolmap.undistort_images(tmp_path, output / "sparse" / "0", photos)
    assert broken_rules(tmp_path / "sparse", tmp_path / "images", UNDISTORTED) == []
