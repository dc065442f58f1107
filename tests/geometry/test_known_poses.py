"""Frames of known poses: the similarity between two worlds, and what two known poses say of a pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.geometry.known_poses import KnownPoses, moved_poses, similarity_between_poses
from mast3r_sfm.geometry.rigid import camera_centre, compose_poses, invert_pose, make_pose
from mast3r_sfm.geometry.similarity import Similarity
from mast3r_sfm.types import Float64


def some_poses(number: int, seed: int = 0) -> Float64:
    rng = np.random.default_rng(seed)
    rotation = Rotation.random(number, random_state=seed).as_matrix()
    return make_pose(rotation, rng.normal(size=(number, 3)))


def some_similarity(seed: int) -> Similarity:
    rng = np.random.default_rng(seed)
    rotation = Rotation.random(random_state=seed).as_matrix()
    return Similarity(scale=float(np.exp(rng.normal())), rotation=rotation, translation=10 * rng.normal(size=3))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_two_poses_or_more_fix_the_similarity(number: int, seed: int) -> None:
    poses, world = some_poses(number, seed), some_similarity(seed)
    moved = moved_poses(poses, world)
    np.testing.assert_allclose(camera_centre(moved), world.apply(camera_centre(poses)), atol=1e-9)
    found = similarity_between_poses(poses, moved)
    assert found.scale == pytest.approx(world.scale, rel=1e-6)
    np.testing.assert_allclose(found.rotation, world.rotation, atol=1e-6)
    np.testing.assert_allclose(found.translation, world.translation, atol=1e-5)


def test_a_third_of_wrong_poses_changes_little() -> None:
    poses, world = some_poses(15), some_similarity(3)
    moved = moved_poses(poses, world)
    moved[:5] = some_poses(5, seed=9)
    found = similarity_between_poses(poses, moved)
    assert np.linalg.norm(found.rotation - world.rotation) < 1e-3
    assert found.scale == pytest.approx(world.scale, rel=1e-3)
    np.testing.assert_allclose(found.translation, world.translation, atol=1e-2)


def test_one_pose_leaves_the_scale() -> None:
    poses = some_poses(1)
    moved = moved_poses(poses, Similarity(scale=1.0, rotation=np.eye(3), translation=np.array([1.0, 2.0, 3.0])))
    found = similarity_between_poses(poses, moved)
    assert found.scale == 1
    np.testing.assert_allclose(found.translation, [1, 2, 3], atol=1e-9)
    with pytest.raises(ShapeError, match="fix no similarity"):
        similarity_between_poses(poses[:0], moved[:0])


def test_poses_on_one_line_are_enough() -> None:
    poses = make_pose(np.tile(np.eye(3), (4, 1, 1)), -np.outer(np.arange(4.0), [1.0, 0.0, 0.0]))
    world = some_similarity(5)
    found = similarity_between_poses(poses, moved_poses(poses, world))
    np.testing.assert_allclose(found.rotation, world.rotation, atol=1e-9)
    assert found.scale == pytest.approx(world.scale)


def known(poses: Float64, images: list[int], **values: bool) -> KnownPoses:
    params = np.concatenate([Rotation.from_matrix(poses[:, :, :3]).as_quat(), poses[:, :, 3]], axis=1)
    return KnownPoses(images=np.array(images, np.int32), params=params, **values)


def test_relative_poses_of_known_images() -> None:
    poses = some_poses(3)
    given_poses = known(poses, [1, 4, 7])
    between = given_poses.relative(4, 7)
    assert between is not None
    np.testing.assert_allclose(between, compose_poses(poses[2], invert_pose(poses[1])), atol=1e-12)
    assert given_poses.relative(4, 5) is None
    row, is_known = given_poses.rows(np.array([0, 1, 7, 9], np.int32))
    assert is_known.tolist() == [False, True, True, False]
    assert row[is_known].tolist() == [0, 2]


def test_nonsense_is_refused() -> None:
    poses = some_poses(2)
    with pytest.raises(ShapeError, match="ascending"):
        known(poses, [3, 3])
    with pytest.raises(ShapeError, match="unit length"):
        KnownPoses(images=np.array([0], np.int32), params=np.ones((1, 7)))
    with pytest.raises(ShapeError, match="finite"):
        KnownPoses(images=np.array([0], np.int32), params=np.full((1, 7), np.nan))
