"""Formats of models: what each consists of, and that COLMAP 3.8's documented layout is what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pycolmap
import pytest

from mast3r_sfm.colmap.mapper import Mapper, MapperSettings
from mast3r_sfm.colmap.model import ColmapModel, read_model, write_models
from mast3r_sfm.config import MapConfig, ModelFormat
from tests.colmap_files import MODELS, read_stored
from tests.exact import ring

FILES = {
    "binary": {"cameras.bin", "images.bin", "points3D.bin", "rigs.bin", "frames.bin"},
    "text": {"cameras.txt", "images.txt", "points3D.txt", "rigs.txt", "frames.txt"},
    "colmap-3.8": {"cameras.bin", "images.bin", "points3D.bin"},
}


@pytest.fixture
def model(make_database: Callable[..., Path]) -> ColmapModel:
    """Five of six images are registered."""
    scene = ring(6, turn_deg=90, points=60)
    settings = MapperSettings(config=MapConfig(), pixel_scale=1.0, threads=1, seed=0)
    return Mapper(make_database(scene), settings).build(dict(enumerate(scene.poses[:5])), grow=False)


@pytest.mark.parametrize("form", get_args(ModelFormat))
def test_each_format_has_its_files_and_reads_back_alike(model: ColmapModel, form: ModelFormat, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "rigs.bin").write_bytes(b"old")
    summaries = write_models([model], tmp_path, form)
    assert {file.name for file in (tmp_path / "0").iterdir()} == FILES[form]
    read = read_model(tmp_path / "0")
    assert summaries == [read.summary(f"{tmp_path.name}/0")]
    assert list(read.cam_from_world) == list(model.cam_from_world)
    for name, pose in model.cam_from_world.items():
        np.testing.assert_allclose(read.cam_from_world[name], pose, atol=1e-12)
        np.testing.assert_allclose(read.cameras[name].params, model.cameras[name].params, rtol=1e-14)
    for image, xy in model.keypoints().items():
        np.testing.assert_allclose(read.keypoints()[image], xy, rtol=1e-14)


def test_the_three_files_are_the_same_with_rigs_and_without(model: ColmapModel, tmp_path: Path) -> None:
    model.write(tmp_path / "new", "binary")
    model.write(tmp_path / "old", "colmap-3.8")
    for name in FILES["colmap-3.8"]:
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()


def test_a_reader_of_colmap_3_8_finds_what_the_model_holds(model: ColmapModel, tmp_path: Path) -> None:
    model.write(tmp_path, "colmap-3.8")
    stored = read_stored(tmp_path)
    assert {image.name for image in stored.images.values()} == set(model.cam_from_world)
    assert len(stored.images) == 5
    assert len(stored.points) == model.num_points > 40
    keypoints = model.keypoints()
    for number, image in stored.images.items():
        pose = np.column_stack([image.rotation, image.translation])
        np.testing.assert_allclose(pose, model.cam_from_world[image.name], atol=1e-12)
        np.testing.assert_array_equal(image.xy, keypoints[number - 1])
        camera, ours = stored.cameras[image.camera], model.cameras[image.name]
        assert (camera.model, camera.width, camera.height) == (ours.model, ours.width_px, ours.height_px)
        np.testing.assert_array_equal(camera.params, ours.params)
    tracks = model.tracks()
    np.testing.assert_array_equal([point.xyz for _, point in sorted(stored.points.items())], tracks.points)
    assert sum(len(point.track) for point in stored.points.values()) == len(tracks.point)


@pytest.mark.parametrize("name", [name for name, _ in MODELS.values()])
def test_colmap_still_gives_camera_models_the_numbers_of_3_8(name: str) -> None:
    number = next(number for number, (known, _) in MODELS.items() if known == name)
    camera = pycolmap.Camera.create_from_model_name(1, name, 500.0, 640, 480)
    assert int(camera.model) == number
    assert len(camera.params) == MODELS[number][1]
