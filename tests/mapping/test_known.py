"""The map stage around known poses: one frame, groups that it holds together, and models brought into it."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from mast3r_sfm.alignment.stage import align
from mast3r_sfm.colmap.cameras import model_poses
from mast3r_sfm.colmap.mapper import MapperSettings
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.config import AlignConfig, MapConfig
from mast3r_sfm.geometry.known_poses import KnownPoses, moved_poses
from mast3r_sfm.geometry.rigid import camera_centre
from mast3r_sfm.geometry.similarity import Similarity
from mast3r_sfm.mapping.stage import MapInput, build_models, write_matches
from mast3r_sfm.types import Float64
from tests.exact import Listener, Scene, ring

SETTINGS = MapperSettings(config=MapConfig(), pixel_scale=1.0, threads=1, seed=0)


def known(poses: Float64, images: list[int], *, is_fixed: bool = True) -> KnownPoses:
    mine = poses[images]
    params = np.concatenate([Rotation.from_matrix(mine[:, :, :3]).as_quat(), mine[:, :, 3]], axis=1)
    return KnownPoses(images=np.array(images, np.int32), params=params, is_fixed=is_fixed)


def mapped(
    scene: Scene, pairs: list[tuple[int, int]], poses: KnownPoses | None, folder: Path
) -> tuple[list[ColmapModel], MapInput]:
    number = len(scene.poses)
    matches = [scene.matches(*pair) for pair in pairs]
    parts = align(matches, number, AlignConfig(), known=poses)
    names = [f"{image:02d}.jpg" for image in range(number)]
    given = MapInput(names=names, rig=scene.rig(), matches=matches, parts=parts, known=poses)
    write_matches(folder / "database.db", given, SETTINGS)
    return build_models(folder / "database.db", given, SETTINGS, Listener()), given


def world() -> Similarity:
    rotation = Rotation.from_euler("xyz", [20, 100, -40], degrees=True).as_matrix()
    return Similarity(scale=7.0, rotation=rotation, translation=np.array([100.0, -20.0, 3.0]))


def halves() -> tuple[Scene, list[tuple[int, int]]]:
    """Two groups of photos that share no pair."""
    scene = ring(8, turn_deg=200)
    return scene, [*combinations(range(4), 2), *combinations(range(4, 8), 2)]


def test_what_nothing_joins_but_the_frame_is_one_model(tmp_path: Path) -> None:
    scene, pairs = halves()
    apart, _ = mapped(scene, pairs, None, tmp_path)
    assert [len(model.cam_from_world) for model in apart] == [4, 4]
    poses = known(moved_poses(scene.poses, world()), [0, 1, 6, 7])
    (model,), given = mapped(scene, pairs, poses, tmp_path)
    assert list(model.cam_from_world) == list(given.names)
    exact = model_poses(model)
    for row, image in enumerate([0, 1, 6, 7]):
        np.testing.assert_array_equal(exact[given.names[image]], poses.params[row])
    found = np.array([model.cam_from_world[name] for name in given.names])
    np.testing.assert_allclose(found, moved_poses(scene.poses, world()), atol=0.02)


def test_a_model_without_known_poses_comes_after_that_with_them(tmp_path: Path) -> None:
    scene = ring(8, turn_deg=200)
    pairs = [*combinations(range(3), 2), *combinations(range(3, 8), 2)]
    poses = known(scene.poses, [0, 1])
    models, _ = mapped(scene, pairs, poses, tmp_path)
    assert [len(model.cam_from_world) for model in models] == [3, 5]
    np.testing.assert_array_equal(model_poses(models[0])["00.jpg"], poses.params[0])


@pytest.mark.parametrize("number", [2, 6])
def test_a_prior_is_refined_and_gives_the_frame(number: int, tmp_path: Path) -> None:
    scene, rng = ring(6, turn_deg=120), np.random.default_rng(1)
    true = moved_poses(scene.poses, world())
    rough = true.copy()
    rough[:, :, 3] += rng.normal(0, 0.05 if number > 2 else 0, (6, 3))
    poses = known(rough, list(range(number)), is_fixed=False)
    (model,), given = mapped(scene, list(combinations(range(6), 2)), poses, tmp_path)
    found = np.array([model.cam_from_world[name] for name in given.names])
    # The truth is 70 units wide: what is refined is better than the prior.
    assert np.linalg.norm(camera_centre(found) - camera_centre(true), axis=1).max() < 0.12
    spread = camera_centre(found) - camera_centre(true)
    before = camera_centre(rough) - camera_centre(true)
    if number > 2:
        assert np.std(spread, axis=0).max() < 0.5 * np.std(before, axis=0).max()
        assert np.abs(spread).max() > 1e-4
