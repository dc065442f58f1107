"""database.db as COLMAP reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from mast3r_sfm.colmap import database as module
from mast3r_sfm.colmap.database import DatabaseContent, colmap_camera, update_keypoints, write_database
from mast3r_sfm.errors import ArtifactError
from mast3r_sfm.geometry.epipolar import homogeneous, sampson_error
from mast3r_sfm.types import Camera, Rig, Verdict
from tests.exact import CENTRE_PX, HEIGHT_PX, WIDTH_PX, ring


@pytest.fixture
def content(make_content: Callable[..., DatabaseContent]) -> DatabaseContent:
    """Five images, all pairs but one, of three kinds."""
    scene = ring(5, turn_deg=90, points=60)
    matches = [scene.matches(*pair) for pair in combinations(range(5), 2) if pair != (1, 3)]
    matches[1] = replace(matches[1], verdict=Verdict.PLANAR)
    none = np.zeros((0, 3))
    matches[2] = replace(matches[2], verdict=Verdict.PURE_ROTATION, points_first=none, points_second=none)
    return make_content(scene, matches)


def test_counts_and_ids(content: DatabaseContent, tmp_path: Path) -> None:
    path = tmp_path / "database.db"
    write_database(path, content)
    with pycolmap.Database.open(str(path)) as database:
        assert database.num_cameras() == 1
        assert database.num_images() == 5
        assert database.num_rigs() == 1
        assert database.num_frames() == 5
        assert database.num_keypoints() == 5 * 60
        assert database.num_matched_image_pairs() == 9
        assert database.num_verified_image_pairs() == 9
        images = database.read_all_images()
        assert {image.image_id: image.name for image in images} == {
            number: f"left/{number - 1:02d}.jpg" for number in range(1, 6)
        }
        assert {image.camera_id for image in images} == {1}
    assert [file.name for file in tmp_path.iterdir()] == ["database.db"]


def test_keypoints_are_colmaps_pixels(content: DatabaseContent, tmp_path: Path) -> None:
    """No half pixel is added or taken away on the way."""
    path = tmp_path / "database.db"
    write_database(path, content)
    with pycolmap.Database.open(str(path)) as database:
        for image, expected in enumerate(content.keypoints):
            stored = database.read_keypoints(image + 1)
            np.testing.assert_array_equal(np.asarray(stored)[:, :2], expected.astype(np.float32))


def test_pairs_hold_their_matches_and_poses(content: DatabaseContent, tmp_path: Path) -> None:
    path = tmp_path / "database.db"
    write_database(path, content)
    kinds = {
        Verdict.GOOD: pycolmap.TwoViewGeometryConfiguration.CALIBRATED,
        Verdict.PLANAR: pycolmap.TwoViewGeometryConfiguration.PLANAR,
        Verdict.PURE_ROTATION: pycolmap.TwoViewGeometryConfiguration.PANORAMIC,
    }
    intrinsics = np.array([[600.0, 0, CENTRE_PX[0]], [0, 600.0, CENTRE_PX[1]], [0, 0, 1]])
    with pycolmap.Database.open(str(path)) as database:
        assert not database.exists_matches(2, 4)
        for match in content.matches:
            ids = match.first + 1, match.second + 1
            expected = content.indices[match.first, match.second]
            np.testing.assert_array_equal(database.read_matches(*ids), expected)
            geometry = database.read_two_view_geometry(*ids)
            np.testing.assert_array_equal(geometry.inlier_matches, expected)
            assert geometry.config == kinds[match.verdict]
            np.testing.assert_allclose(geometry.cam2_from_cam1.matrix(), match.second_from_first, atol=1e-12)
            # The pose and the matched keypoints tell the same story.
            x, y, z = geometry.cam2_from_cam1.translation
            cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
            inverse = np.linalg.inv(intrinsics)
            fundamental = inverse.T @ cross @ geometry.cam2_from_cam1.rotation.matrix() @ inverse
            first = content.keypoints[match.first][expected[:, 0]]
            second = content.keypoints[match.second][expected[:, 1]]
            assert homogeneous(first).shape == (60, 3)
            assert sampson_error(fundamental, first, second).max() < 1e-3


@pytest.mark.parametrize("model", ["SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"])
def test_cameras_in_every_model(model: str) -> None:
    camera = Camera(model="SIMPLE_PINHOLE", width_px=640, height_px=480, params=np.array([600.0, 300.5, 250.25]))
    written = colmap_camera(camera, model, 3)
    assert written.camera_id == 3
    assert written.model.name == model
    assert (written.width, written.height) == (640, 480)
    assert written.mean_focal_length() == 600
    assert (written.principal_point_x, written.principal_point_y) == (300.5, 250.25)
    np.testing.assert_array_equal(written.params[written.extra_params_idxs()], 0)
    assert not written.has_prior_focal_length
    assert colmap_camera(replace(camera, focal_is_known=True), model, 3).has_prior_focal_length
    # Without distortion all models are the pinhole.
    np.testing.assert_allclose(written.img_from_cam([0.1, -0.2, 1.0]), [360.5, 130.25])


def test_each_image_has_its_camera(content: DatabaseContent, tmp_path: Path) -> None:
    camera = content.rig.cameras[0]
    second = replace(camera, params=np.array([900.0, 240.0, 320.0]), width_px=HEIGHT_PX, height_px=WIDTH_PX)
    rig = Rig(cameras=(camera, second), camera_of_image=np.array([0, 1, 0, 1, 1], np.int32))
    path = tmp_path / "database.db"
    write_database(path, replace(content, rig=rig))
    with pycolmap.Database.open(str(path)) as database:
        ids = {image.image_id: image.camera_id for image in database.read_all_images()}
        assert ids == {1: 1, 2: 2, 3: 1, 4: 2, 5: 2}
        assert database.read_camera(2).mean_focal_length() == 900
        assert database.num_rigs() == 2


def test_a_new_database_replaces_the_old_one(content: DatabaseContent, tmp_path: Path) -> None:
    path = tmp_path / "database.db"
    path.write_bytes(b"something else")
    write_database(path, content)
    write_database(path, replace(content, names=[f"new/{image}.jpg" for image in range(5)]))
    with pycolmap.Database.open(str(path)) as database:
        assert sorted(image.name for image in database.read_all_images())[0] == "new/0.jpg"
        assert database.num_images() == 5
    assert [file.name for file in tmp_path.iterdir()] == ["database.db"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("database or disk is full")])
def test_what_stood_there_survives_a_failure(
    content: DatabaseContent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    path = tmp_path / "database.db"
    write_database(path, content)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(module, "_write_pairs", fail)
    with pytest.raises(ArtifactError, match=r"cannot write .*database\.db.*choose another folder"):
        write_database(path, content)
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there(content: DatabaseContent, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot write"):
        write_database(tmp_path / "missing" / "database.db", content)


def test_a_folder_in_the_way(content: DatabaseContent, tmp_path: Path) -> None:
    (tmp_path / "database.db").mkdir()
    with pytest.raises(ArtifactError, match="cannot write"):
        write_database(tmp_path / "database.db", content)


def test_a_database_without_matches(make_content: Callable[..., DatabaseContent], tmp_path: Path) -> None:
    path = tmp_path / "database.db"
    write_database(path, make_content(ring(3), []))
    with pycolmap.Database.open(str(path)) as database:
        assert database.num_images() == 3
        assert database.num_matches() == 0


def test_keypoints_are_moved_and_all_else_stays(content: DatabaseContent, tmp_path: Path) -> None:
    path = tmp_path / "database.db"
    write_database(path, content)
    rng = np.random.default_rng(0)
    moved = {image: content.keypoints[image] + rng.normal(size=(60, 2)) for image in (4, 0, 2)}
    update_keypoints(path, moved)
    with pycolmap.Database.open(str(path)) as database:
        for image, before in enumerate(content.keypoints):
            stored = np.asarray(database.read_keypoints(image + 1))
            np.testing.assert_array_equal(stored[:, :2], moved.get(image, before).astype(np.float32))
        assert database.num_keypoints() == 5 * 60
        assert database.num_images() == 5
        assert database.num_verified_image_pairs() == 9
        for (first, second), indices in content.indices.items():
            np.testing.assert_array_equal(database.read_matches(first + 1, second + 1), indices)
            geometry = database.read_two_view_geometry(first + 1, second + 1)
            np.testing.assert_array_equal(geometry.inlier_matches, indices)
    assert [file.name for file in tmp_path.iterdir()] == ["database.db"]


def test_more_keypoints_than_before_leave_the_matches_valid(content: DatabaseContent, tmp_path: Path) -> None:
    """Models have further observations, which are keypoints behind those that the matches know."""
    path = tmp_path / "database.db"
    write_database(path, content)
    rng = np.random.default_rng(0)
    more = {
        image: np.concatenate([content.keypoints[image] + 0.25, rng.uniform(0, 400, (7 * image, 2))])
        for image in (1, 3)
    }
    update_keypoints(path, more)
    with pycolmap.Database.open(str(path)) as database:
        assert database.num_keypoints() == 5 * 60 + 7 + 21
        for image, before in enumerate(content.keypoints):
            stored = np.asarray(database.read_keypoints(image + 1))
            np.testing.assert_array_equal(stored[:, :2], more.get(image, before).astype(np.float32))
            assert database.num_keypoints_for_image(image + 1) == len(stored)
        for (first, second), indices in content.indices.items():
            np.testing.assert_array_equal(database.read_matches(first + 1, second + 1), indices)
            geometry = database.read_two_view_geometry(first + 1, second + 1)
            np.testing.assert_array_equal(geometry.inlier_matches, indices)
        cache = pycolmap.DatabaseCache.create(database, pycolmap.DatabaseCacheOptions())
    # What COLMAP's mapper starts from: all keypoints, and the matches of those that have any.
    for image, before in enumerate(content.keypoints):
        assert cache.image(image + 1).num_points2D() == len(more.get(image, before))
    graph = cache.correspondence_graph
    assert graph.num_image_pairs() == 9
    assert {graph.num_correspondences_for_image(image + 1) for image in (0, 2, 4)} == {4 * 60}
    # And back again.
    update_keypoints(path, dict(enumerate(content.keypoints)))
    with pycolmap.Database.open(str(path)) as database:
        assert database.num_keypoints() == 5 * 60


def test_a_model_reads_moved_keypoints(content: DatabaseContent, tmp_path: Path) -> None:
    """The cache from which COLMAP's mapper starts."""
    path = tmp_path / "database.db"
    write_database(path, content)
    moved = {image: xy + 0.25 for image, xy in enumerate(content.keypoints)}
    update_keypoints(path, moved)
    with pycolmap.Database.open(str(path)) as database:
        cache = pycolmap.DatabaseCache.create(database, pycolmap.DatabaseCacheOptions())
    for image, xy in moved.items():
        found = np.array([keypoint.xy for keypoint in cache.image(image + 1).points2D])
        np.testing.assert_array_equal(found, xy.astype(np.float32))


def test_moving_no_keypoints(content: DatabaseContent, tmp_path: Path) -> None:
    path = tmp_path / "database.db"
    write_database(path, content)
    update_keypoints(path, {})
    with pycolmap.Database.open(str(path)) as database:
        for image, before in enumerate(content.keypoints):
            stored = np.asarray(database.read_keypoints(image + 1))
            np.testing.assert_array_equal(stored[:, :2], before.astype(np.float32))


def test_keypoints_of_what_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "database.db"
    path.write_bytes(b"something else, and long enough to be no empty database" * 100)
    with pytest.raises(ArtifactError, match=r"cannot write .*database\.db.*choose another folder"):
        update_keypoints(path, {0: np.zeros((3, 2))})
