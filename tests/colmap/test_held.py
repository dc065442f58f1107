"""Models around known cameras and poses: these come out to the bit, and the rest fits to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from mast3r_sfm.colmap.cameras import model_poses, pose_params
from mast3r_sfm.colmap.database import write_database
from mast3r_sfm.colmap.held import Held
from mast3r_sfm.colmap.mapper import Mapper, MapperSettings
from mast3r_sfm.colmap.model import ColmapModel, read_model
from mast3r_sfm.config import MapConfig
from mast3r_sfm.geometry.rigid import camera_centre, compose_poses, make_pose, rotation_from_axis_angle
from mast3r_sfm.types import Camera, Float64, PairMatches, Rig
from tests.exact import Scene, ring

NUMBER = 6
SETTINGS = MapperSettings(config=MapConfig(), pixel_scale=1.0, threads=1, seed=0)


def arc() -> Scene:
    return ring(NUMBER, turn_deg=100, points=250)


def nudged(scene: Scene, seed: int = 0) -> dict[int, Float64]:
    rng = np.random.default_rng(seed)
    turns = rotation_from_axis_angle(rng.normal(0, np.radians(0.8), (NUMBER, 3)))
    shifts = rng.normal(0, 0.06, (NUMBER, 3))
    return {
        image: compose_poses(make_pose(turn, shift), pose)
        for image, (pose, turn, shift) in enumerate(zip(scene.poses, turns, shifts, strict=True))
    }


def noisy_matches(scene: Scene, noise_px: float) -> list[PairMatches]:
    noise = noise_px * np.random.default_rng(1).normal(size=(NUMBER, len(scene.points), 2))
    found = []
    for first, second in combinations(range(NUMBER), 2):
        match, seen = scene.matches(first, second), scene.sees(first) & scene.sees(second)
        one, two = match.xy_first + noise[first][seen], match.xy_second + noise[second][seen]
        found.append(replace(match, xy_first=one, xy_second=two))
    return found


def given_camera(model: str = "OPENCV", *, fixed: bool = True, focal: float = 600.0) -> Camera:
    params = {"PINHOLE": [focal, focal, 320.0, 240.0], "OPENCV": [focal, focal, 320.0, 240.0, 0.0, 1e-4, 0.0, -1e-5]}
    return Camera(
        model=model,
        width_px=640,
        height_px=480,
        params=np.array(params[model]),
        focal_is_known=True,
        is_given=True,
        is_fixed=fixed,
    )


@pytest.fixture
def build(make_content: Callable[..., Any], tmp_path: Path) -> Callable[..., ColmapModel]:
    """build(fixed=[0, 1], camera=…, readjust=True, …): a model of the arc, written and read."""

    def make(
        fixed: Sequence[int] = (),
        camera: Camera | None = None,
        *,
        noise_px: float = 0.5,
        start: dict[int, Float64] | None = None,
        matches: Sequence[PairMatches] | None = None,
        readjust: bool = True,
    ) -> ColmapModel:
        scene = arc()
        content = make_content(scene, noisy_matches(scene, noise_px) if matches is None else matches)
        rig = content.rig if camera is None else Rig(cameras=(camera,), camera_of_image=content.rig.camera_of_image)
        write_database(tmp_path / "database.db", replace(content, rig=rig))
        held = Held.of(rig, {image: pose_params(scene.poses[image]) for image in fixed})
        mapper = Mapper(tmp_path / "database.db", SETTINGS, held)
        model = mapper.build(nudged(scene) if start is None else start)
        model = mapper.readjust(model) if readjust else model
        model.write(tmp_path / "model")
        return read_model(tmp_path / "model")

    return make


def name(image: int) -> str:
    return f"left/{image:02d}.jpg"


@pytest.mark.parametrize("readjust", [False, True])
@pytest.mark.parametrize("model", ["PINHOLE", "OPENCV"])
def test_a_fixed_camera_comes_out_to_the_bit(build: Callable[..., ColmapModel], model: str, readjust: bool) -> None:
    # A focal length that is off: the photos speak against it, and it stays.
    camera = given_camera(model, focal=615.0)
    found = build(camera=camera, readjust=readjust)
    assert len(found.cameras) == NUMBER
    for one in found.cameras.values():
        assert one.model == model
        np.testing.assert_array_equal(one.params, camera.params)


def test_a_prior_camera_is_refined_and_keeps_its_model_and_principal_point(build: Callable[..., ColmapModel]) -> None:
    camera = given_camera(fixed=False, focal=615.0)
    for one in build(camera=camera).cameras.values():
        assert one.model == "OPENCV"
        assert one.params[0] == pytest.approx(600, rel=3e-3)
        np.testing.assert_array_equal(one.params[2:4], camera.params[2:4])


@pytest.mark.parametrize("readjust", [False, True])
@pytest.mark.parametrize("fixed", [[0, 1], [1, 3, 4], list(range(NUMBER))])
def test_fixed_poses_come_out_to_the_bit(build: Callable[..., ColmapModel], fixed: list[int], readjust: bool) -> None:
    scene = arc()
    found = build(fixed, readjust=readjust)
    poses = model_poses(found)
    assert sorted(poses) == [name(image) for image in range(NUMBER)]
    for image in fixed:
        np.testing.assert_array_equal(poses[name(image)], pose_params(scene.poses[image]))
    # The others stand in the same frame and scale, and are adjusted to it.
    centres = camera_centre(np.array([found.cam_from_world[name(image)] for image in range(NUMBER)]))
    size = np.linalg.norm(np.ptp(camera_centre(scene.poses), axis=0))
    assert np.abs(centres - camera_centre(scene.poses)).max() < 0.01 * size
    assert found.summary("").mean_reprojection_error_px < 1.0
    assert found.num_points > 200


def test_what_is_fixed_is_constant_in_the_adjustment(make_content: Callable[..., Any], tmp_path: Path) -> None:
    """Rather than moved, and put back in the end."""
    scene = arc()
    content = make_content(scene, noisy_matches(scene, 0.3))
    rig = Rig(cameras=(given_camera("PINHOLE"),), camera_of_image=content.rig.camera_of_image)
    write_database(tmp_path / "database.db", replace(content, rig=rig))
    held = Held.of(rig, {image: pose_params(scene.poses[image]) for image in (1, 4)})
    model = Mapper(tmp_path / "database.db", SETTINGS, held).build(nudged(scene)).reconstruction
    config = held.configure(model)
    for number in range(1, NUMBER + 1):
        assert config.has_constant_rig_from_world_pose(model.image(number).frame_id) == (number - 1 in (1, 4))
    assert config.has_constant_cam_intrinsics(1)
    assert config.fixed_gauge.name == "UNSPECIFIED"
    assert Held().configure(model).fixed_gauge.name == "TWO_CAMS_FROM_WORLD"


def test_the_others_are_brought_to_the_scale_of_fixed_poses(build: Callable[..., ColmapModel]) -> None:
    scene = arc()
    start = dict(enumerate(scene.poses))
    for image in (2, 3, 4, 5):
        # As if the world around image 0 were a seventh larger.
        centre = camera_centre(scene.poses[0]) + 1.15 * (
            camera_centre(scene.poses[image]) - camera_centre(scene.poses[0])
        )
        rotation = scene.poses[image][:, :3]
        start[image] = make_pose(rotation, -rotation @ centre)
    found = build([0, 1], start=start, readjust=False)
    centres = camera_centre(np.array([found.cam_from_world[name(image)] for image in range(NUMBER)]))
    size = np.linalg.norm(np.ptp(camera_centre(scene.poses), axis=0))
    assert np.linalg.norm(centres - camera_centre(scene.poses), axis=1).max() < 0.01 * size
    assert found.summary("").mean_reprojection_error_px < 1.0


def test_one_fixed_pose_leaves_the_scale_as_it_was_begun(build: Callable[..., ColmapModel]) -> None:
    scene = arc()
    found = build([2])
    np.testing.assert_array_equal(model_poses(found)[name(2)], pose_params(scene.poses[2]))
    centres = camera_centre(np.array([found.cam_from_world[name(image)] for image in range(NUMBER)]))
    here, there = (np.linalg.norm(np.ptp(places, axis=0)) for places in (centres, camera_centre(scene.poses)))
    assert 0.9 < here / there < 1.1
    assert len(found.cam_from_world) == NUMBER
    assert found.summary("").mean_reprojection_error_px < 1.0


def test_without_fixed_poses_the_frame_is_another(build: Callable[..., ColmapModel]) -> None:
    poses = model_poses(build())
    scene = arc()
    assert all(not np.array_equal(poses[name(image)], pose_params(scene.poses[image])) for image in range(NUMBER))


def test_a_fixed_image_without_any_match_stays(build: Callable[..., ColmapModel]) -> None:
    scene = arc()
    matches = [match for match in noisy_matches(scene, 0.3) if 5 not in (match.first, match.second)]
    found = build(range(NUMBER), matches=matches)
    poses = model_poses(found)
    np.testing.assert_array_equal(poses[name(5)], pose_params(scene.poses[5]))
    assert not (found.tracks().image == 5).any()


def test_others_are_registered_into_the_frame_of_fixed_poses(build: Callable[..., ColmapModel]) -> None:
    scene = arc()
    found = build([0, 1, 2], start={image: scene.poses[image] for image in (0, 1, 2)}, camera=given_camera("PINHOLE"))
    assert sorted(found.poses()) == list(range(NUMBER))
    for image in (3, 4, 5):
        pose = found.poses()[image]
        turn = Rotation.from_matrix(pose[:, :3] @ scene.poses[image][:, :3].T).magnitude()
        assert np.degrees(turn) < 0.2
        assert np.linalg.norm(camera_centre(pose) - camera_centre(scene.poses[image])) < 0.03


def test_wrong_fixed_poses_stay_wrong(build: Callable[..., ColmapModel]) -> None:
    """Nothing is done to them behind the user's back; what disagrees are the points."""
    scene = arc()
    wrong = nudged(scene, seed=3)
    held = {image: pose_params(wrong[image]) for image in range(NUMBER)}
    content = build(range(NUMBER), noise_px=0.0)
    assert content.summary("").mean_reprojection_error_px < 1e-3
    assert all(not np.array_equal(held[image], pose_params(scene.poses[image])) for image in held)


def test_a_model_beside_the_fixed_poses_has_a_frame_of_its_own(
    make_content: Callable[..., Any], tmp_path: Path
) -> None:
    scene = arc()
    content = make_content(scene, noisy_matches(scene, 0.3))
    write_database(tmp_path / "database.db", content)
    mapper = Mapper(tmp_path / "database.db", SETTINGS, Held.of(content.rig, {0: pose_params(scene.poses[0])}))
    beside = mapper.build({image: scene.poses[image] for image in (1, 2, 3)})
    # Image 0 sees its points, but is not its own.
    assert sorted(beside.poses()) == [1, 2, 3, 4, 5]


def test_fixed_cameras_that_no_image_of_the_model_has(make_content: Callable[..., Any], tmp_path: Path) -> None:
    scene = arc()
    content = make_content(scene, noisy_matches(scene, 0.3))
    cameras = tuple(given_camera("PINHOLE", focal=600.0 + image) for image in range(NUMBER))
    rig = Rig(cameras=cameras, camera_of_image=np.arange(NUMBER, dtype=np.int32))
    write_database(tmp_path / "database.db", replace(content, rig=rig))
    mapper = Mapper(tmp_path / "database.db", SETTINGS, Held.of(rig))
    start = nudged(scene)
    model = mapper.readjust(mapper.build({image: start[image] for image in (0, 1, 2)}, grow=False))
    assert [camera.params[0] for camera in model.cameras.values()] == [600, 601, 602]
    grown = mapper.build({image: start[image] for image in (0, 1, 2)})
    assert [camera.params[0] for camera in grown.cameras.values()] == [600.0 + image for image in range(NUMBER)]


def test_extreme_cameras_are_not_taken_for_nonsense(build: Callable[..., ColmapModel]) -> None:
    """COLMAP drops images with a parameter of distortion above 1."""
    # (1 + 2 r²) / (1 + 2 r²): large parameters, and no distortion.
    params = np.array([600.0, 600.0, 320.0, 240.0, 2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0])
    found = build(camera=replace(given_camera(), model="FULL_OPENCV", params=params))
    assert len(found.cameras) == NUMBER
    np.testing.assert_array_equal(next(iter(found.cameras.values())).params, params)
