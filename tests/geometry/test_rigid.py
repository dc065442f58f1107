"""Rigid transforms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from mast3r_sfm.geometry.rigid import (
    angle_between_rotations,
    camera_centre,
    compose_poses,
    invert_pose,
    make_pose,
    rotation_from_axis_angle,
    transform_points,
)
from mast3r_sfm.types import Float64


def random_poses(seed: int, count: int) -> Float64:
    rng = np.random.default_rng(seed)
    return make_pose(rotation_from_axis_angle(rng.normal(size=(count, 3))), rng.normal(size=(count, 3)))


def test_rotation_from_axis_angle_agrees_with_scipy() -> None:
    vectors = np.random.default_rng(0).normal(0, 2, (200, 3))
    expected = Rotation.from_rotvec(vectors).as_matrix()
    np.testing.assert_allclose(rotation_from_axis_angle(vectors), expected, atol=1e-14)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-7, 3.0, np.pi])
def test_rotation_from_axis_angle_is_exact_at_the_ends(angle: float) -> None:
    rotation = rotation_from_axis_angle(np.array([0.0, 0.0, angle]))
    expected = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    np.testing.assert_allclose(rotation, expected, rtol=0, atol=1e-15)


@given(st.integers(0, 1000))
def test_a_pose_times_its_inverse_is_the_identity(seed: int) -> None:
    poses = random_poses(seed, 3)
    np.testing.assert_allclose(compose_poses(poses, invert_pose(poses)), np.tile(np.eye(3, 4), (3, 1, 1)), atol=1e-12)


@given(st.integers(0, 1000))
def test_composing_is_moving_points_twice(seed: int) -> None:
    a_from_b, b_from_c = random_poses(seed, 2)
    points = np.random.default_rng(seed).normal(size=(4, 5, 3))
    twice = transform_points(a_from_b, transform_points(b_from_c, points))
    np.testing.assert_allclose(transform_points(compose_poses(a_from_b, b_from_c), points), twice, atol=1e-12)


def test_camera_centre_maps_to_the_camera_origin() -> None:
    (pose,) = random_poses(5, 1)
    np.testing.assert_allclose(transform_points(pose, camera_centre(pose)), 0, atol=1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-3, 1.0, 3.0, np.pi])
def test_angle_between_rotations(angle: float) -> None:
    rng = np.random.default_rng(7)
    axis = rng.normal(size=3)
    first = rotation_from_axis_angle(rng.normal(size=3))
    second = first @ rotation_from_axis_angle(axis / np.linalg.norm(axis) * angle)
    assert angle_between_rotations(first, second) == pytest.approx(angle, rel=1e-6, abs=1e-15)
