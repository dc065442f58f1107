"""Photos and truth on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mast3r_sfm.errors import ArtifactError, ConfigError, InputError
from mast3r_sfm.evaluation.truth import read_truth_json
from mast3r_sfm.synthetic.photos import write_photos
from tests.scenes import facade_views, room_views


def test_poses_and_intrinsics_come_back_from_the_truth_file(tmp_path: Path) -> None:
    views = facade_views(3)
    write_photos(tmp_path, views)
    truth = read_truth_json(tmp_path / "gt.json")
    assert sorted(truth.cam_from_world) == sorted(views)
    for name, view in views.items():
        np.testing.assert_allclose(truth.cam_from_world[name], view.cam_from_world, atol=1e-12)
        np.testing.assert_allclose(truth.intrinsics[name], view.K, atol=1e-12)


def test_truth_counts_pixels_from_the_centre_of_the_first(tmp_path: Path) -> None:
    views = facade_views(3)
    write_photos(tmp_path, views)
    for name, view in views.items():
        entry = json.loads((tmp_path / "gt.json").read_text(encoding="utf-8"))["images"][name]
        assert (entry["width"], entry["height"]) == (128, 96)
        point = view.points_world[10, 30]
        image = np.array(entry["K"]) @ (np.array(entry["R"]) @ point + np.array(entry["t"]))
        np.testing.assert_allclose(image[:2] / image[2], (30, 10), atol=1e-9)


def test_photos_look_like_the_views(tmp_path: Path) -> None:
    (name, view), *_ = room_views().items()
    write_photos(tmp_path, {"left side/ä.jpg": view, name: view, "c.png": view})
    for path in ("left side/ä.jpg", name):
        with Image.open(tmp_path / "images" / path) as photo:
            assert photo.size == (128, 96)
            assert np.abs(np.asarray(photo).astype(float) - view.image).mean() < 6
    with Image.open(tmp_path / "images" / "c.png") as photo:
        np.testing.assert_array_equal(np.asarray(photo), view.image)


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "a", "a.txt"])
def test_names_that_are_no_photos_are_refused(name: str, tmp_path: Path) -> None:
    view = next(iter(room_views().values()))
    with pytest.raises(InputError, match="relative path"):
        write_photos(tmp_path / "out", {name: view})
    assert not (tmp_path / "out").exists()


def test_impossible_quality_and_folder_are_refused(tmp_path: Path) -> None:
    views = room_views()
    with pytest.raises(ConfigError, match="quality"):
        write_photos(tmp_path, views, quality=200)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="choose another folder"):
        write_photos(tmp_path / "file", views)
