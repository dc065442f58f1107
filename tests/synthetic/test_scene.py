"""Rays against boxes and spheres, and what scenes refuse."""

from __future__ import annotations

import numpy as np
import pytest

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.synthetic.scene import Box, Scene, Sphere
from mast3r_sfm.synthetic.texture import Material
from mast3r_sfm.types import Float64

GREY = Material(seed=1, colour=(0.5, 0.5, 0.5))
HALL = Box(centre=(0.0, 0.0, 0.0), half_size=(10.0, 5.0, 8.0), material=GREY, hollow=True)


def directions(number: int) -> Float64:
    return np.random.default_rng(3).normal(size=(number, 3))


def test_a_box_is_hit_on_its_near_face_and_a_hollow_one_on_its_far_face() -> None:
    box = Box(centre=(0.0, 0.0, 4.0), half_size=(1.0, 1.0, 0.5), material=GREY)
    rays = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.2, 0.1, 1.0]])
    np.testing.assert_allclose(box.distances(np.zeros(3), rays), [3.5, np.inf, np.inf, 3.5])
    np.testing.assert_allclose(HALL.distances(np.zeros(3), rays), [8.0, 8.0, 10.0, 8.0])


def test_a_turned_box_is_hit_at_its_corner() -> None:
    box = Box(centre=(0.0, 0.0, 4.0), half_size=(1.0, 1.0, 1.0), material=GREY, yaw=np.pi / 4)
    assert box.distances(np.zeros(3), np.array([[0.0, 0.0, 1.0]]))[0] == pytest.approx(4 - np.sqrt(2))


@pytest.mark.parametrize("yaw", [0.0, 0.7, -2.0])
def test_box_hits_lie_on_the_face_that_the_normal_names(yaw: float) -> None:
    box = Box(centre=(0.5, -0.2, 3.0), half_size=(1.0, 0.6, 0.8), material=GREY, yaw=yaw)
    origin, rays = np.array([0.1, 0.3, -1.0]), directions(4000)
    rays = rays[np.isfinite(box.distances(origin, rays))]
    assert len(rays) > 50
    hits = box.hits(origin, rays)
    np.testing.assert_allclose(hits.distance, box.distances(origin, rays))
    points = origin + hits.distance[:, None] * rays - np.array(box.centre)
    # The face is as far from the centre as the half size along its normal.
    reach = np.einsum("ki,ki->k", points, hits.normal)
    assert np.abs(reach[:, None] - np.array(box.half_size)).min(axis=1).max() < 1e-9
    assert (np.einsum("ki,ki->k", rays, hits.normal) < 0).all()
    assert set(hits.face) <= set(range(6))


def test_sphere_hits_lie_on_the_sphere_and_face_the_viewer() -> None:
    ball = Sphere(centre=(0.5, 0.2, 3.0), radius=0.9, material=GREY)
    rays = directions(4000)
    distance = ball.distances(np.zeros(3), rays)
    rays = rays[np.isfinite(distance)]
    assert 50 < len(rays) < 1000
    hits = ball.hits(np.zeros(3), rays)
    radius = np.linalg.norm(hits.distance[:, None] * rays - np.array(ball.centre), axis=1)
    np.testing.assert_allclose(radius, 0.9)
    np.testing.assert_allclose(np.linalg.norm(hits.normal, axis=1), 1.0)
    assert (np.einsum("ki,ki->k", rays, hits.normal) < 0).all()


def test_nearest_finds_the_minimum_over_all_surfaces() -> None:
    rng = np.random.default_rng(0)
    bodies = []
    for _ in range(12):
        x, y, z = rng.uniform(-1, 1, 3) * (8, 4, 6)
        bodies.append(Box(centre=(x, y, z), half_size=(0.9, 0.4, 0.6), material=GREY, yaw=rng.uniform(0, 3)))
        bodies.append(Sphere(centre=(-x, y, z), radius=0.7, material=GREY))
    scene = Scene(enclosure=HALL, bodies=tuple(bodies), light=(0.0, -4.0, 0.0))
    origin, rays = np.array([0.3, 0.1, -7.0]), directions(3000)
    distance, index = scene.nearest(origin, rays)
    every = np.stack([surface.distances(origin, rays) for surface in scene.surfaces])
    np.testing.assert_array_equal(index, every.argmin(axis=0))
    np.testing.assert_array_equal(distance, every.min(axis=0))
    assert len(set(index)) > 12
    assert np.isfinite(distance).all()


def test_a_body_shades_what_is_behind_it_but_not_itself() -> None:
    box = Box(centre=(0.0, 0.0, 0.0), half_size=(1.0, 0.1, 1.0), material=GREY)
    scene = Scene(enclosure=HALL, bodies=(box,), light=(0.0, -4.0, 0.0))
    points = np.array([[0.0, 5.0, 0.0], [6.0, 5.0, 0.0], [0.3, -0.1, 0.4], [0.3, 0.1, 0.4]])
    assert scene.is_lit(points).tolist() == [False, True, True, False]


def test_impossible_bodies_are_refused() -> None:
    with pytest.raises(ShapeError, match="half_size"):
        Box(centre=(0.0, 0.0, 0.0), half_size=(1.0, 0.0, 1.0), material=GREY)
    with pytest.raises(ShapeError, match="radius"):
        Sphere(centre=(0.0, 0.0, 0.0), radius=-1.0, material=GREY)
    solid = Box(centre=(0.0, 0.0, 0.0), half_size=(1.0, 1.0, 1.0), material=GREY)
    with pytest.raises(ShapeError, match="hollow"):
        Scene(enclosure=solid, bodies=(), light=(0.0, 0.0, 0.0))
