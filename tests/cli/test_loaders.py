"""What `reconstruct` writes keeps the rules of those who read it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest

from tests.colmap_files import StoredModel, read_stored
from tests.loaders import ANY_LENS, UNDISTORTED, broken, broken_rules, keypoints_outside

Command = Callable[..., Any]


def test_models_open_in_nerfstudio_and_gsplat(finished_run: Any, photo_folder: Path) -> None:
    assert broken_rules(finished_run.output / "sparse" / "0", photo_folder, ANY_LENS) == []
    stored = read_stored(finished_run.output / "sparse" / "0")
    assert keypoints_outside(stored) == []
    assert keypoints_outside(with_image(stored, xy=first(stored).xy - 400.0)) == [first(stored).name]


@pytest.fixture(scope="module")
def undistorted(finished_run: Any, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undistorted")
    pycolmap.undistort_images(folder, finished_run.output / "sparse" / "0", photo_folder)
    return folder


def test_undistorted_they_open_in_gaussian_splatting(undistorted: Path, finished_run: Any) -> None:
    assert broken_rules(undistorted / "sparse", undistorted / "images", UNDISTORTED) == []
    before, after = read_stored(finished_run.output / "sparse" / "0"), read_stored(undistorted / "sparse")
    assert {image.name for image in after.images.values()} == {image.name for image in before.images.values()}
    assert len(after.points) == len(before.points)
    # A pinhole camera explains the undistorted photos as well as the distorted one explained the others.
    errors = []
    for image in after.images.values():
        mine = image.points >= 0
        local = image.local(np.array([after.points[point].xyz for point in image.points[mine].tolist()]))
        fx, fy, cx, cy = after.cameras[image.camera].params
        errors.append(np.linalg.norm(local[:, :2] / local[:, 2:] * [fx, fy] + [cx, cy] - image.xy[mine], axis=1))
    assert 0.02 < np.median(np.concatenate(errors)) < 0.6


@pytest.mark.parametrize("model", ["SIMPLE_PINHOLE", "PINHOLE", "RADIAL", "OPENCV", "OPENCV_FISHEYE"])
def test_every_camera_model_opens(
    model: str, finished_run: Any, photo_folder: Path, tmp_path: Path, run_here: Command
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished_run.output, output)
    result = run_here(
        "reconstruct", photo_folder, "-o", output, "--threads", 2, "--camera-model", model, "--format", "colmap-3.8",
        "--set", "map.refine=false",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert sorted(path.name for path in (output / "sparse" / "0").iterdir()) == [
        "cameras.bin", "images.bin", "points3D.bin",
    ]  # fmt: skip
    stored = read_stored(output / "sparse" / "0")
    assert {camera.model for camera in stored.cameras.values()} == {model}
    assert len(stored.images) == len(list(photo_folder.iterdir()))
    assert list(broken(stored, photo_folder, ANY_LENS)) == []


def test_photos_in_folders_are_found_by_their_names(example: Path, tmp_path: Path, run_here: Command) -> None:
    photos = tmp_path / "photos"
    for number, path in enumerate(sorted((example / "images").iterdir())[:4]):
        target = photos / ("first day" if number % 2 else "ändern/b") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    result = run_here("reconstruct", photos, "-o", tmp_path / "out", "--threads", 2, "--set", "map.refine=false")
    assert result.code == 0, result.err
    stored = read_stored(tmp_path / "out" / "sparse" / "0")
    assert {image.name.rpartition("/")[0] for image in stored.images.values()} == {"first day", "ändern/b"}
    assert list(broken(stored, photos, ANY_LENS)) == []
    result = run_here(
        "reconstruct", photos, "-o", tmp_path / "out", "--threads", 2, "--set", "map.refine=false", "--format", "text"
    )
    assert result.code == 0
    assert "have spaces, which COLMAP does not understand in text" in result.err


def with_image(model: StoredModel, **values: Any) -> StoredModel:
    number = min(model.images)
    return replace(model, images=model.images | {number: replace(model.images[number], **values)})


def with_point(model: StoredModel, **values: Any) -> StoredModel:
    number = min(model.points)
    return replace(model, points=model.points | {number: replace(model.points[number], **values)})


def with_camera(model: StoredModel, **values: Any) -> StoredModel:
    number = min(model.cameras)
    return replace(model, cameras=model.cameras | {number: replace(model.cameras[number], **values)})


def first(model: StoredModel) -> Any:
    return model.images[min(model.images)]


DAMAGE: dict[str, tuple[Callable[[StoredModel], StoredModel], Collection[str]]] = {
    "is a SIMPLE_RADIAL": (lambda model: model, UNDISTORTED),
    "impossible parameters": (lambda model: with_camera(model, params=(-700.0, 400.0, 300.0, 0.0)), ANY_LENS),
    "principal point outside": (lambda model: with_camera(model, params=(700.0, 900.0, 300.0, 0.0)), ANY_LENS),
    "and its camera": (lambda model: with_camera(model, width=600, height=800), ANY_LENS),
    "is not found below": (lambda model: with_image(model, name="gone.jpg"), ANY_LENS),
    "twice": (lambda model: with_image(model, name=model.images[max(model.images)].name), ANY_LENS),
    "has no camera": (lambda model: with_image(model, camera=77), ANY_LENS),
    "impossible pose": (lambda model: with_image(model, quaternion=2 * first(model).quaternion), ANY_LENS),
    "see": (lambda model: with_image(model, quaternion=np.roll(first(model).quaternion, -1)), ANY_LENS),
    "which does not exist": (lambda model: with_image(model, points=first(model).points + 10**6), ANY_LENS),
    "does not name it": (lambda model: with_image(model, points=np.full_like(first(model).points, -1)), ANY_LENS),
    "by two images": (lambda model: with_point(model, track=()), ANY_LENS),
    "is nowhere": (lambda model: with_point(model, xyz=np.full(3, np.nan)), ANY_LENS),
}


@pytest.mark.parametrize("part", DAMAGE)
def test_a_broken_model_does_not_pass(part: str, finished_run: Any, photo_folder: Path) -> None:
    damage, models = DAMAGE[part]
    stored = read_stored(finished_run.output / "sparse" / "0")
    assert any(part in rule for rule in broken(damage(stored), photo_folder, models))
