"""Views are exact: depth, points and pixels agree with each other and between views."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mast3r_sfm.errors import ConfigError, InputError, ShapeError
from mast3r_sfm.geometry.rigid import transform_points
from mast3r_sfm.synthetic.cameras import Kind, PosedCamera, look_at, make_cameras
from mast3r_sfm.synthetic.covisibility import correspond
from mast3r_sfm.synthetic.render import pixel_centres, render
from mast3r_sfm.synthetic.scenes import make_scene
from tests.scenes import HEIGHT_PX, WIDTH_PX, facade_views, plane_views, room_views, rotation_views, scene_views

KINDS: tuple[Kind, ...] = ("room", "facade", "object", "plane", "rotation")


@pytest.mark.parametrize("kind", KINDS)
def test_points_lie_at_the_depth_of_their_own_pixel(kind: Kind) -> None:
    for view in scene_views(kind, 3).values():
        local = transform_points(view.cam_from_world, view.points_world)
        np.testing.assert_allclose(local[..., 2], view.depth, rtol=1e-12)
        xy, _ = view.camera.project(view.points_world)
        np.testing.assert_allclose(xy.reshape(-1, 2), pixel_centres(WIDTH_PX, HEIGHT_PX), atol=1e-9)
        assert 0.5 < view.depth.min() < view.depth.max() < 80


@pytest.mark.parametrize("kind", KINDS)
def test_a_ray_to_a_seen_point_meets_the_same_surface(kind: Kind) -> None:
    views = list(scene_views(kind, 3).values())
    scene = make_scene(kind, 0)
    xy, seen = correspond(views[0], views[1])
    assert 0.2 < seen.mean() < 1
    camera = views[1].camera
    rays = camera.rays(xy[seen]) @ camera.cam_from_world[:, :3]
    distance, _ = scene.nearest(camera.centre, rays)
    met = camera.centre + distance[:, None] * rays
    wrong = np.linalg.norm(met - views[0].points_world[seen], axis=-1) > 0.03 * views[0].depth[seen]
    # Beside edges a depth between two pixels may pass for the point's own.
    assert wrong.mean() < 0.005


def test_what_is_not_seen_is_hidden_or_out_of_the_picture() -> None:
    first, second = list(room_views().values())[:2]
    xy, seen = correspond(first, second)
    scene = make_scene("room", 0)
    rays = first.points_world - second.camera.centre
    distance, _ = scene.nearest(second.camera.centre, rays.reshape(-1, 3))
    hidden = (distance < 0.99).reshape(seen.shape)
    inside = ((xy > 0.5) & (xy < (WIDTH_PX - 0.5, HEIGHT_PX - 0.5))).all(axis=-1)
    assert 0.02 < (hidden & inside).mean() < 0.5
    assert (seen & hidden).mean() < 0.003
    # What is in the picture and not hidden is seen, but for a seam along the edges.
    assert (seen & inside).sum() > 0.85 * (inside & ~hidden).sum()


def test_colours_agree_between_views() -> None:
    first, second = list(facade_views().values())[:2]
    xy, seen = correspond(first, second)
    column, row = np.round(xy[seen] - 0.5).astype(int).T
    here, there = first.image[seen].astype(float), second.image[row, column].astype(float)
    assert np.corrcoef(here.ravel(), there.ravel())[0, 1] > 0.8
    shuffled = np.random.default_rng(0).permutation(there)
    assert np.corrcoef(here.ravel(), shuffled.ravel())[0, 1] < 0.3


def test_the_plane_is_flat_and_the_facade_is_not() -> None:
    def thickness(points) -> float:
        points = points.reshape(-1, 3) - points.reshape(-1, 3).mean(axis=0)
        return float(np.linalg.svd(points, full_matrices=False)[1][2] / math.sqrt(len(points)))

    assert all(thickness(view.points_world) < 1e-9 for view in plane_views().values())
    assert all(thickness(view.points_world) > 0.05 for view in facade_views().values())


def test_a_pure_rotation_has_one_centre_and_the_others_have_not() -> None:
    centres = np.array([view.camera.centre for view in rotation_views().values()])
    assert np.abs(centres - centres[0]).max() < 1e-9
    axes = np.array([view.cam_from_world[2, :3] for view in rotation_views().values()])
    assert math.degrees(math.acos(axes[0] @ axes[-1])) > 60
    for views in (room_views(), facade_views()):
        centres = np.array([view.camera.centre for view in views.values()])
        steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
        assert 0.2 < steps.min() < steps.max() < 2.5


@pytest.mark.parametrize(("number", "turn_deg"), [(6, 100.0), (18, 340.0), (40, 351.0)])
def test_an_orbit_closes_once_there_are_enough_photos(number: int, turn_deg: float) -> None:
    centres = np.array([camera.centre for camera in make_cameras("object", number)])
    angle = np.unwrap(np.arctan2(centres[:, 0], -centres[:, 2]))
    assert np.degrees(angle[-1] - angle[0]) == pytest.approx(turn_deg, abs=4)


def test_the_seed_decides_everything() -> None:
    camera = make_cameras("room", 4, width_px=48, height_px=36, seed=2)[1]
    image = render(make_scene("room", 2), camera).image
    again = make_cameras("room", 4, width_px=48, height_px=36, seed=2)[1]
    np.testing.assert_array_equal(render(make_scene("room", 2), again).image, image)
    assert (render(make_scene("room", 3), camera).image != image).mean() > 0.5


def test_more_samples_change_colours_a_little_and_the_truth_not_at_all() -> None:
    scene, (camera,) = make_scene("facade", 0), make_cameras("facade", 1, width_px=64, height_px=48)
    coarse, fine = render(scene, camera, samples=1), render(scene, camera, samples=4)
    np.testing.assert_array_equal(coarse.depth, fine.depth)
    difference = np.abs(coarse.image.astype(float) - fine.image)
    assert 0.5 < difference.mean() < 15


def test_pixels_project_to_where_their_rays_go() -> None:
    camera = make_cameras("object", 5, width_px=64, height_px=48)[3]
    xy = np.random.default_rng(1).uniform(0, 48, (100, 2))
    world = camera.centre + 3 * camera.rays(xy) @ camera.cam_from_world[:, :3]
    back, depth = camera.project(world)
    np.testing.assert_allclose(back, xy, atol=1e-9)
    np.testing.assert_allclose(depth, 3)


def test_looking_at_a_target_puts_it_into_the_middle_upright() -> None:
    pose = look_at(np.array([1.0, -2.0, 0.5]), np.array([0.0, 0.0, 4.0]))
    np.testing.assert_allclose(transform_points(pose, np.array([0.0, 0.0, 4.0]))[:2], 0, atol=1e-12)
    assert np.linalg.det(pose[:, :3]) == pytest.approx(1)
    assert pose[0, 1] == pytest.approx(0)
    assert pose[1, 1] > 0.5


def test_wrong_use_is_refused() -> None:
    scene = make_scene("room", 0)
    (camera,) = make_cameras("room", 1, width_px=32, height_px=24)
    with pytest.raises(ConfigError, match="samples"):
        render(scene, camera, samples=0)
    with pytest.raises(ConfigError, match="number of cameras"):
        make_cameras("room", 0)
    with pytest.raises(ConfigError, match="kind 'cellar'"):
        make_cameras("cellar", 2)  # type: ignore[arg-type]
    outside = look_at(np.array([0.0, 0.0, -9.0]), np.zeros(3))
    with pytest.raises(InputError, match="outside"):
        render(scene, PosedCamera(cam_from_world=outside, intrinsics=camera.intrinsics, width_px=32, height_px=24))
    with pytest.raises(ShapeError, match="3, 4"):
        PosedCamera(cam_from_world=np.eye(4), intrinsics=np.eye(3), width_px=32, height_px=24)
