"""Two-view geometry against what it is defined by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.geometry.epipolar import homogeneous, rays, rotation_between, sampson_error, triangulate
from mast3r_sfm.geometry.rigid import make_pose, rotation_from_axis_angle, transform_points
from mast3r_sfm.types import Float64

FOCAL_PX = 700.0
CENTRE_PX = np.array([320.0, 240.0])


def project(points: Float64) -> Float64:
    return FOCAL_PX * points[:, :2] / points[:, 2:] + CENTRE_PX


def unit(vectors: Float64) -> Float64:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_pair(seed: int, count: int = 30) -> tuple[Float64, Float64]:
    """A relative pose with a baseline, and points in front of both cameras."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=3)
    baseline = direction / np.linalg.norm(direction) * rng.uniform(0.5, 1.5)
    pose = make_pose(rotation_from_axis_angle(rng.normal(0, 0.2, 3)), baseline)
    points = rng.uniform([-2, -2, 4], [2, 2, 12], (count, 3))
    return pose, points


def fundamental_of(pose: Float64) -> Float64:
    x, y, z = pose[:, 3]
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ pose[:, :3]
    inverse = np.linalg.inv(np.array([[FOCAL_PX, 0, CENTRE_PX[0]], [0, FOCAL_PX, CENTRE_PX[1]], [0, 0, 1]]))
    return inverse.T @ essential @ inverse


def test_homogeneous() -> None:
    np.testing.assert_array_equal(homogeneous(np.array([[1.0, 2.0]])), [[1, 2, 1]])
    assert homogeneous(np.zeros((0, 2))).shape == (0, 3)


@given(st.integers(0, 1000))
def test_rays_look_at_what_the_pixels_show(seed: int) -> None:
    _, points = random_pair(seed)
    found = rays(project(points), FOCAL_PX, CENTRE_PX)
    np.testing.assert_allclose(found, unit(points), atol=1e-12)
    np.testing.assert_allclose(rays(CENTRE_PX[None], FOCAL_PX, CENTRE_PX), [[0, 0, 1]])


@given(st.integers(0, 1000))
def test_the_error_of_true_matches_is_zero(seed: int) -> None:
    pose, points = random_pair(seed)
    fundamental = fundamental_of(pose)
    first, second = project(points), project(transform_points(pose, points))
    assert sampson_error(fundamental, first, second).max() < 1e-8
    # The scale of F means nothing.
    np.testing.assert_allclose(
        sampson_error(-7.0 * fundamental, first, second + 1.0), sampson_error(fundamental, first, second + 1.0)
    )


@given(st.integers(0, 1000))
def test_the_error_is_the_distance_to_the_nearest_match_that_fits(seed: int) -> None:
    """To first order: a move across the epipolar lines shared by both pixels."""
    pose, points = random_pair(seed)
    fundamental = fundamental_of(pose)
    first, second = project(points), project(transform_points(pose, points))
    gradient = np.concatenate(
        [(homogeneous(second) @ fundamental)[:, :2], (homogeneous(first) @ fundamental.T)[:, :2]], axis=1
    )
    steps = 0.01 * unit(gradient)
    found = sampson_error(fundamental, first + steps[:, :2], second + steps[:, 2:])
    np.testing.assert_allclose(found, 0.01, rtol=0.02)


def test_the_error_of_a_sideways_pair_is_a_difference_of_rows() -> None:
    """Two cameras side by side: epipolar lines are rows, and the error is shared by both pixels."""
    fundamental = fundamental_of(make_pose(np.eye(3), np.array([1.0, 0.0, 0.0])))
    first = np.array([[100.0, 50.0], [300.0, 200.0]])
    second = first + np.array([[-40.0, 0.0], [-40.0, 3.0]])
    np.testing.assert_allclose(sampson_error(fundamental, first, second), [0, 3 / np.sqrt(2)], atol=1e-12)


def test_no_geometry_gives_no_nan() -> None:
    xy = np.array([[1.0, 2.0]])
    assert np.isfinite(sampson_error(np.zeros((3, 3)), xy, xy)).all()


@given(st.integers(0, 1000), st.integers(2, 40))
def test_the_rotation_between_turned_rays(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    first = unit(rng.normal(size=(count, 3)))
    turn = rotation_from_axis_angle(rng.normal(size=3))
    found = rotation_between(first, first @ turn.T)
    np.testing.assert_allclose(found, turn, atol=1e-6)
    assert np.linalg.det(found) == pytest.approx(1)


@given(st.integers(0, 200))
def test_the_rotation_is_the_best_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = unit(rng.normal(size=(12, 3))), unit(rng.normal(size=(12, 3)))
    best = rotation_between(first, second)
    assert np.linalg.det(best) == pytest.approx(1)  # never a mirror
    cost = ((second - first @ best.T) ** 2).sum()
    for nudge in rotation_from_axis_angle(rng.normal(0, 0.1, (20, 3))):
        assert ((second - first @ (nudge @ best).T) ** 2).sum() >= cost - 1e-12


@pytest.mark.parametrize("count", [0, 1])
def test_a_rotation_needs_two_rays(count: int) -> None:
    with pytest.raises(ShapeError, match=f"at least 2 rays, not {count}"):
        rotation_between(np.ones((count, 3)), np.ones((count, 3)))


@given(st.integers(0, 1000))
def test_rays_meet_in_the_true_points(seed: int) -> None:
    pose, points = random_pair(seed)
    seen = transform_points(pose, points)
    found, angle = triangulate(pose, unit(points), unit(seen))
    np.testing.assert_allclose(found, points, rtol=1e-4, atol=1e-5)
    centre = -pose[:, :3].T @ pose[:, 3]
    cosine = (unit(points) * unit(points - centre)).sum(axis=1)
    np.testing.assert_allclose(angle, np.arccos(np.clip(cosine, -1, 1)), atol=1e-6)
    # Lengths follow the baseline.
    larger, _ = triangulate(make_pose(pose[:, :3], 3 * pose[:, 3]), unit(points), unit(seen))
    np.testing.assert_allclose(larger, 3 * found, rtol=1e-6)


def test_skew_rays_meet_half_way() -> None:
    pose = make_pose(np.eye(3), np.array([-2.0, 0.0, 0.0]))  # second camera at x = 2
    first = unit(np.array([[1.0, 0.1, 1.0]]))
    second = unit(np.array([[-1.0, 0.0, 1.0]]))
    (point,), _ = triangulate(pose, first, second)
    on_first, on_second = point @ first[0] * first[0], np.array([2.0, 0, 0])
    along = (point - on_second) @ second[0] * second[0] + on_second
    np.testing.assert_allclose(point, (on_first + along) / 2, atol=1e-9)


def test_rays_that_part_have_a_negative_depth() -> None:
    pose = make_pose(np.eye(3), np.array([-1.0, 0.0, 0.0]))
    found, angle = triangulate(pose, unit(np.array([[-0.3, 0.0, 1.0]])), unit(np.array([[0.3, 0.0, 1.0]])))
    assert found[0, 2] < 0
    assert angle[0] == pytest.approx(2 * np.arctan(0.3))


@pytest.mark.parametrize("baseline", [1.0, 1e-3])
def test_parallel_rays_meet_far_away_but_not_nowhere(baseline: float) -> None:
    pose = make_pose(np.eye(3), np.array([-baseline, 0.0, 0.0]))
    forward = np.array([[0.0, 0.0, 1.0]])
    found, angle = triangulate(pose, forward, forward)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found) <= 1e6 * baseline * (1 + 1e-9)
    assert angle[0] == 0


def test_nothing_to_triangulate() -> None:
    found, angle = triangulate(np.eye(3, 4), np.zeros((0, 3)), np.zeros((0, 3)))
    assert found.shape == (0, 3)
    assert angle.shape == (0,)
