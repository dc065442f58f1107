"""Pixels of known lenses and of the pinhole cameras in their place."""

from __future__ import annotations

import numpy as np
import pytest

from mast3r_sfm.colmap.lens import Lens, straighten_matches
from mast3r_sfm.types import Camera, Rig
from tests.exact import ring

SIZE = 640, 480
CAMERAS = {
    "SIMPLE_PINHOLE": [600.0, 322.0, 241.0],
    "PINHOLE": [600.0, 615.0, 322.0, 241.0],
    "SIMPLE_RADIAL": [600.0, 322.0, 241.0, -0.1],
    "OPENCV": [600.0, 615.0, 322.0, 241.0, -0.15, 0.03, 0.001, -0.002],
    "OPENCV_FISHEYE": [400.0, 402.0, 322.0, 241.0, 0.02, -0.004, 0.0, 0.0],
    "FULL_OPENCV": [600.0, 615.0, 322.0, 241.0, -0.15, 0.03, 0.001, -0.002, 0.0, 0.0, 0.0, 0.0],
}


def camera(model: str) -> Camera:
    params = np.array(CAMERAS[model])
    return Camera(model=model, width_px=SIZE[0], height_px=SIZE[1], params=params, focal_is_known=True, is_given=True)


@pytest.mark.parametrize("model", CAMERAS)
def test_straight_pixels_are_those_of_a_pinhole_camera(model: str) -> None:
    lens = Lens(camera=camera(model))
    xy = np.random.default_rng(0).uniform([0, 0], SIZE, (500, 2))
    straight = lens.straighten(xy)
    np.testing.assert_allclose(lens.bend(straight), xy, atol=1e-6)
    bent = np.abs(straight - xy).max()
    assert (bent < 1e-9) if model == "SIMPLE_PINHOLE" else (bent > 1.0)
    # A straight line of the world is one in straight pixels.
    line = np.array([0.3, -0.2, 1.0]) + np.linspace(-0.3, 0.3, 20)[:, None] * np.array([0.9, 0.5, 0.2])
    seen = lens.straighten(lens.bend(lens.focal_px * line[:, :2] / line[:, 2:] + lens.centre_px))
    assert np.linalg.svd(seen - seen.mean(axis=0), compute_uv=False)[1] < 1e-5


def test_what_looks_aside_has_no_straight_pixel() -> None:
    wide = Camera(
        model="OPENCV_FISHEYE",
        width_px=640,
        height_px=480,
        params=np.array([150.0, 150.0, 320.0, 240.0, 0.0, 0.0, 0.0, 0.0]),
        is_given=True,
    )
    straight = Lens(camera=wide).straighten(np.array([[0.0, 0.0], [320.0, 240.0]]))
    assert np.isnan(straight[0]).all()
    np.testing.assert_allclose(straight[1], [320, 240])


def test_matches_are_straightened_where_the_camera_was_given() -> None:
    scene = ring(2, turn_deg=30)
    match, lens = scene.matches(0, 1), Lens(camera=camera("OPENCV"))
    plain = scene.rig().cameras[0]
    rig = Rig(cameras=(plain, lens.camera), camera_of_image=np.array([0, 1], np.int32))
    (moved,), pinholes = straighten_matches([match], rig)
    np.testing.assert_array_equal(moved.xy_first, match.xy_first)
    np.testing.assert_allclose(moved.xy_second, lens.straighten(match.xy_second))
    assert pinholes.cameras[0] is plain
    assert pinholes.cameras[1].model == "SIMPLE_PINHOLE"
    np.testing.assert_allclose(pinholes.cameras[1].params, [lens.focal_px, 322.0, 241.0])
    untouched, same = straighten_matches([match], scene.rig())
    assert untouched[0] is match
    assert len(same.cameras) == 1
