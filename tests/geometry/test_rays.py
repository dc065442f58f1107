"""Points from the rays on which they were seen."""

from __future__ import annotations

import numpy as np
import pytest

from mast3r_sfm.geometry.rays import meet_rays
from mast3r_sfm.types import Float64, Int64

POINTS, VIEWS = 40, 6


def seen(noise: float = 0.0) -> tuple[Float64, Int64, Float64, Float64]:
    """True points [K, 3], and the point, centre and direction of every ray."""
    rng = np.random.default_rng(3)
    points = rng.uniform([-2, -2, 4], [2, 2, 6], (POINTS, 3))
    centres = rng.uniform([-1, -1, -0.5], [1, 1, 0.5], (VIEWS, 3))
    point = np.repeat(np.arange(POINTS), VIEWS)
    places = np.tile(centres, (POINTS, 1))
    rays = points[point] - places
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    rays += noise * rng.normal(size=rays.shape)
    return points, point, places, rays / np.linalg.norm(rays, axis=1, keepdims=True)


def test_exact_rays_meet_in_the_points() -> None:
    points, point, centres, rays = seen()
    start = points + np.random.default_rng(0).normal(0, 0.3, points.shape)
    np.testing.assert_allclose(meet_rays(start, point, centres, rays, 1e-3), points, atol=1e-6)


def test_noise_of_the_rays_is_that_of_the_points() -> None:
    points, point, centres, rays = seen(noise=1e-3)
    found = meet_rays(points + 0.1, point, centres, rays, 1e-3)
    error = np.linalg.norm(found - points, axis=1)
    assert 1e-3 < np.median(error) < 2e-2


def test_a_wrong_ray_counts_little() -> None:
    points, point, centres, rays = seen()
    wrong = np.arange(0, len(rays), VIEWS)
    rays[wrong] += 0.1 * np.random.default_rng(1).normal(size=(len(wrong), 3))
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    robust, plain = (
        np.linalg.norm(meet_rays(points + 0.1, point, centres, rays, scale) - points, axis=1) for scale in (1e-3, 1e3)
    )
    assert np.median(robust) < 0.2 * np.median(plain)


@pytest.mark.parametrize("number", [0, 1])
def test_a_point_of_too_few_rays_does_not_run_away(number: int) -> None:
    """One ray says nothing of the distance, and none says nothing at all."""
    points, point, centres, rays = seen()
    first = np.flatnonzero(point == 0)[:number]
    kept = np.r_[first, np.flatnonzero(point != 0)]
    start = points.copy()
    start[0] += [0.02, 0.0, 0.0]
    found = meet_rays(start, point[kept], centres[kept], rays[kept], 1e-3)
    assert np.linalg.norm(found[0] - points[0]) <= 0.0201
    np.testing.assert_allclose(found[1:], points[1:], atol=1e-6)


def test_no_points_are_none() -> None:
    nothing: Float64 = np.zeros((0, 3))
    assert meet_rays(nothing, np.zeros(0, np.int64), nothing, nothing, 1e-3).shape == (0, 3)
