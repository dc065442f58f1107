"""Matches on a logo, a frame or a bonnet are recognised; scenes that hardly move are not taken for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.evaluation.pairs import direction_angle
from mast3r_sfm.geometry.rigid import angle_between_rotations, rotation_from_axis_angle
from mast3r_sfm.matching.calibrated import View, calibrate_pair
from mast3r_sfm.matching.check import Putative, check_pair
from mast3r_sfm.matching.overlay import MIN_SHARP, in_border, overlay_matches
from mast3r_sfm.types import Bool, Float32, Float64, Verdict
from tests.exact import CENTRE_PX, HEIGHT_PX, WIDTH_PX, Scene, random_pixels, ring, street, turning

CONFIG = MatchConfig()
SIZE = np.array([WIDTH_PX, HEIGHT_PX], np.float64)
FRAME = np.stack([np.zeros(2), SIZE])
FRAMES = (FRAME, FRAME)
VIEW = View(focal_px=600.0, centre_px=CENTRE_PX, scale=1.0)


def box(rng: np.random.Generator, count: int, low: tuple[float, float], high: tuple[float, float]) -> Float64:
    """[count, 2] pixels inside a box, whose corners are shares of the picture."""
    return rng.uniform(low, high, (count, 2)) * SIZE


def logo(rng: np.random.Generator) -> Float64:
    return box(rng, 30, (0.83, 0.88), (0.98, 0.98))


def timestamp(rng: np.random.Generator) -> Float64:
    return box(rng, 25, (0.6, 0.94), (0.97, 0.98))


def big_logo_in_the_middle(rng: np.random.Generator) -> Float64:
    return box(rng, 60, (0.4, 0.42), (0.6, 0.58))


def printed_frame(rng: np.random.Generator) -> Float64:
    xy = random_pixels(rng, 1000)
    inside = ((xy > 0.07 * SIZE.min()) & (xy < SIZE - 0.07 * SIZE.min())).all(axis=1)
    return xy[~inside]


def bonnet(rng: np.random.Generator) -> Float64:
    xy = box(rng, 400, (0.0, 0.75), (1.0, 1.0))
    return xy[(((xy / SIZE - [0.5, 1.0]) / [0.55, 0.25]) ** 2).sum(axis=1) < 1]


OVERLAYS = [logo, timestamp, big_logo_in_the_middle, printed_frame, bonnet]


def distinct(
    xy_first: Float64, xy_second: Float64, confidence: Float32, frames: tuple[Float64, Float64] | None = FRAMES
) -> Putative:
    """Matches that all have a say."""
    return Putative(
        xy_first=xy_first,
        xy_second=xy_second,
        confidence=confidence,
        is_distinct=np.ones(len(xy_first), np.bool_),
        frames=frames,
    )


def same_place(rng: np.random.Generator, xy: Float64, noise_px: float = 0.1) -> Putative:
    """As sure as a match can be."""
    other = xy + noise_px * rng.normal(size=xy.shape)
    return distinct(xy, other, np.full(len(xy), 0.99, np.float32))


def noise(rng: np.random.Generator, count: int) -> Putative:
    confidence = rng.uniform(0.8, 0.9, count).astype(np.float32)
    return distinct(random_pixels(rng, count), random_pixels(rng, count), confidence, frames=None)


def together(*parts: Putative) -> tuple[Putative, Bool]:
    """All matches in random order, and which of them are of the first part."""
    order = np.random.default_rng(5).permutation(sum(len(part.xy_first) for part in parts))
    xy_first, xy_second = (np.concatenate([getattr(part, n) for part in parts]) for n in ("xy_first", "xy_second"))
    confidence = np.concatenate([part.confidence for part in parts])
    whole = distinct(xy_first, xy_second, confidence).subset(order)
    return whole, order < len(parts[0].xy_first)


def found(putative: Putative) -> Bool:
    return overlay_matches(putative.xy_first, putative.xy_second, FRAMES)


def assert_unchanged(putative: Putative) -> None:
    """Nothing is taken for an overlay, so that the pair is judged as if nothing were known of such things."""
    assert not found(putative).any()
    edge = check_pair((0, 1), replace(putative, frames=FRAMES), CONFIG, 0)
    blind = check_pair((0, 1), replace(putative, frames=None), CONFIG, 0)
    assert edge.verdict is blind.verdict is Verdict.GOOD
    np.testing.assert_array_equal(edge.xy_first, blind.xy_first)


def assert_unharmed(putative: Putative) -> None:
    """Some may be put aside, but what stands still because it is far away comes back, but for that in the border."""
    matches, edges = [], []
    for frames in (None, FRAMES):
        edges.append(check_pair((0, 1), replace(putative, frames=frames), CONFIG, 0))
        matches.append(calibrate_pair(edges[-1], VIEW, VIEW, CONFIG, 0))
    blind, match = matches
    assert match.verdict is blind.verdict
    assert match.verdict.is_link
    inside = [int((~in_border(edge.xy_first, FRAME)).sum()) for edge in edges]
    assert inside[1] >= 0.98 * inside[0]
    assert len(match) >= 0.98 * len(blind)
    assert np.degrees(angle_between_rotations(match.second_from_first[:, :3], blind.second_from_first[:, :3])) < 0.1
    if match.verdict.has_depth:
        assert np.degrees(direction_angle(match.second_from_first[:, 3], blind.second_from_first[:, 3])) < 1


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("seed", range(3))
def test_photos_that_share_an_overlay_only(overlay: Callable[[np.random.Generator], Float64], seed: int) -> None:
    rng = np.random.default_rng(seed)
    putative, is_overlay = together(same_place(rng, overlay(rng)), noise(rng, 60))
    # It would be believed: this is why it has to be known.
    assert check_pair((0, 1), replace(putative, frames=None), CONFIG, 0).verdict is Verdict.GOOD
    edge = check_pair((0, 1), putative, CONFIG, 0)
    assert edge.verdict is Verdict.WATERMARK
    # At most one of the noise may by chance stand there too, and none of the overlay is judged.
    assert abs(edge.num_putative - 60) <= 1
    np.testing.assert_array_equal(found(putative) & is_overlay, is_overlay)
    match = calibrate_pair(edge, VIEW, VIEW, CONFIG, 0)
    assert match.verdict is Verdict.WATERMARK
    assert len(match) == 0
    assert match.inlier_ratio < 0.5


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("make_scene", [lambda: ring(2, turn_deg=40), lambda: turning(2)])
def test_an_overlay_beside_true_matches_is_dropped(
    overlay: Callable[[np.random.Generator], Float64], make_scene: Callable[[], Scene]
) -> None:
    rng, scene = np.random.default_rng(0), make_scene()
    true, _ = scene.putative(0, 1, outliers=0.3, noise_px=0.4)
    putative, is_overlay = together(same_place(rng, overlay(rng)), true)
    dropped = found(putative)
    assert dropped[is_overlay].mean() > 0.95
    assert dropped[~is_overlay].mean() < 0.01
    matches = []
    for given_matches in (true, putative):
        edge = check_pair((0, 1), replace(given_matches, frames=FRAMES), CONFIG, 0)
        matches.append(calibrate_pair(edge, VIEW, VIEW, CONFIG, 0))
    assert matches[0].verdict.is_link
    assert matches[1].verdict is matches[0].verdict
    assert len(matches[1]) == pytest.approx(len(matches[0]), rel=0.02)
    turn = angle_between_rotations(*(match.second_from_first[:, :3] for match in matches))
    assert np.degrees(turn) < 0.1


@pytest.mark.parametrize("overlay", [logo, timestamp, printed_frame, bonnet])
def test_a_drive_straight_ahead_loses_the_overlay_in_the_border(
    overlay: Callable[[np.random.Generator], Float64],
) -> None:
    """Without a turn, what stands still agrees with the motion: it is infinitely far away."""
    rng, scene = np.random.default_rng(0), street(4)
    true, _ = scene.putative(0, 3, outliers=0.3, noise_px=0.4)
    marks = overlay(rng)
    putative, _ = together(same_place(rng, marks), true)
    edge = check_pair((0, 1), putative, CONFIG, 0)
    in_place = np.linalg.norm(edge.xy_first - edge.xy_second, axis=1) < 0.5
    assert (in_place & in_border(edge.xy_first, FRAME)).sum() <= 0.05 * in_border(marks, FRAME).sum()
    match = calibrate_pair(edge, VIEW, VIEW, CONFIG, 0)
    assert match.verdict is Verdict.GOOD
    truth = scene.second_from_first(0, 3)
    assert np.degrees(angle_between_rotations(match.second_from_first[:, :3], truth[:, :3])) < 0.2
    assert np.degrees(direction_angle(match.second_from_first[:, 3], truth[:, 3])) < 1
    # And so far away, it has no depth.
    assert (np.linalg.norm(match.xy_first - match.xy_second, axis=1) < 0.5).sum() < 10


def test_an_overlay_is_a_pull_that_matters() -> None:
    """Otherwise the test before would show nothing: a bonnet makes a camera that turns look as if it stood still."""
    rng, scene = np.random.default_rng(0), turning(2)
    true, _ = scene.putative(0, 1, outliers=0.6, noise_px=0.4)
    putative, _ = together(same_place(rng, bonnet(rng)), true)
    truth = scene.second_from_first(0, 1)[:, :3]
    error = []
    for frames in (None, FRAMES):
        edge = check_pair((0, 1), replace(putative, frames=frames), CONFIG, 0)
        match = calibrate_pair(edge, VIEW, VIEW, CONFIG, 0)
        error.append(np.degrees(angle_between_rotations(match.second_from_first[:, :3], truth)))
    assert error[0] > 5
    assert error[1] < 0.2


@pytest.mark.parametrize("noise_px", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("outliers", [0, 150])
def test_two_photos_from_one_tripod_are_an_honest_pair(noise_px: float, outliers: int) -> None:
    rng = np.random.default_rng(0)
    putative, _ = together(same_place(rng, random_pixels(rng, 400), noise_px), noise(rng, outliers))
    assert_unchanged(putative)
    match = calibrate_pair(check_pair((0, 1), putative, CONFIG, 0), VIEW, VIEW, CONFIG, 0)
    assert match.verdict is Verdict.PURE_ROTATION
    assert len(match) > 380


def test_a_tripod_under_an_empty_sky() -> None:
    rng = np.random.default_rng(0)
    putative, _ = together(same_place(rng, box(rng, 300, (0, 0.55), (1, 1))), noise(rng, 12))
    assert_unchanged(putative)


def test_a_tripod_with_a_logo_stays_a_tripod() -> None:
    rng = np.random.default_rng(0)
    putative, _ = together(same_place(rng, logo(rng)), same_place(rng, random_pixels(rng, 400), 0.3), noise(rng, 60))
    assert_unchanged(putative)


@pytest.mark.parametrize("turn_deg", [0.05, 0.15])
def test_a_slow_video_is_an_honest_pair(turn_deg: float) -> None:
    """Turned by half a pixel, or by one and a half."""
    putative, _ = turning(2, step_deg=turn_deg).putative(0, 1, outliers=0.2, noise_px=0.2)
    assert_unchanged(putative)


@pytest.mark.parametrize("noise_px", [0.1, 0.3])
@pytest.mark.parametrize("highest", [-500.0, -2200.0])
def test_sideways_before_a_far_background(noise_px: float, highest: float) -> None:
    """A strip of hills in the middle, or all above, stands still; the lower half passes by, with nothing in between."""
    rng = np.random.default_rng(0)
    far = rng.uniform([-3000, highest, 6000], [3000, -200, 6500], (250, 3))
    close = rng.uniform([-3, 0.2, 5], [3, 3, 9], (300, 3))
    step = np.eye(3, 4)
    step[0, 3] = -0.4
    scene = Scene(points=np.concatenate([far, close]), poses=np.stack([np.eye(3, 4), step]))
    putative, _ = scene.putative(0, 1, outliers=0.2, noise_px=noise_px)
    distance = np.linalg.norm(putative.xy_second - putative.xy_first, axis=1)
    assert (distance < 1.5).sum() > 150
    assert ((distance > 1.5) & (distance < 15)).sum() < 20
    if highest > -1000:
        assert found(putative).sum() > 150  # they are put aside first: here, the test tests something
    assert_unharmed(putative)


@pytest.mark.parametrize("step", [0.02, 0.1, 0.8, 3.0])
@pytest.mark.parametrize("noise_px", [0.05, 0.3])
def test_forward_motion(step: float, noise_px: float) -> None:
    """What lies straight ahead stands still, and the farther from there, the faster it moves."""
    scene = street(2)
    far = np.random.default_rng(1).uniform([-40, -20, 300], [40, 20, 400], (400, 3))
    second = scene.poses[0].copy()
    second[2, 3] -= step
    scene = replace(scene, points=np.concatenate([scene.points, far]), poses=np.stack([scene.poses[0], second]))
    putative, _ = scene.putative(0, 1, outliers=0.2, noise_px=noise_px)
    assert (np.linalg.norm(putative.xy_second - putative.xy_first, axis=1) < 0.75).sum() > 50
    assert_unharmed(putative)


@pytest.mark.parametrize("turn_deg", [0.2, 1.0, 5.0, 30.0])
def test_a_turn_about_the_optical_axis(turn_deg: float) -> None:
    scene = turning(1, points=6000)
    roll = rotation_from_axis_angle(np.radians([0.0, 0.0, turn_deg]))
    scene = replace(scene, poses=np.stack([scene.poses[0], roll @ scene.poses[0]]))
    putative, _ = scene.putative(0, 1, outliers=0.2, noise_px=0.2)
    assert_unharmed(putative)
    match = calibrate_pair(check_pair((0, 1), replace(putative, frames=FRAMES), CONFIG, 0), VIEW, VIEW, CONFIG, 0)
    assert match.verdict is Verdict.PURE_ROTATION


@pytest.mark.parametrize("turn_deg", [0.5, 1.0, 2.0])
def test_a_turn_about_a_corner(turn_deg: float) -> None:
    """There, in the border, the picture stands still, and moves the more the farther from there."""
    rng = np.random.default_rng(0)
    xy, corner = random_pixels(rng, 3000), np.array([40.0, 30.0])
    turn = rotation_from_axis_angle(np.radians([0.0, 0.0, turn_deg]))[:2, :2]
    other = (xy - corner) @ turn.T + corner + 0.1 * rng.normal(size=xy.shape)
    assert (np.linalg.norm(other - xy, axis=1) < 0.75).sum() >= MIN_SHARP
    assert not overlay_matches(xy, other, FRAMES).any()


@pytest.mark.parametrize("zoom", [1.003, 1.01, 1.1])
def test_a_zoom(zoom: float) -> None:
    rng = np.random.default_rng(0)
    xy = random_pixels(rng, 600)
    other = (xy - CENTRE_PX) * zoom + CENTRE_PX + 0.2 * rng.normal(size=xy.shape)
    putative = distinct(xy, other, np.ones(600, np.float32))
    edge = check_pair((0, 1), putative, CONFIG, 0)
    assert edge.verdict is Verdict.GOOD
    assert len(edge.xy_first) > 0.9 * 600


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)])
def test_photos_of_different_shapes_have_their_logo_in_the_same_corner(corner: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    upright = np.stack([np.array([7.0, 3.0]), np.array([7.0, 3.0]) + SIZE[::-1]])
    shift = upright[0] + np.array(corner) * (SIZE[::-1] - SIZE)
    marks = np.array(corner) * SIZE + rng.uniform(-50, 50, (30, 2))
    other = noise(rng, 60)
    first = np.concatenate([marks, other.xy_first])
    second = np.concatenate([marks + shift, other.xy_second])
    for found_in in (
        overlay_matches(first, second, (FRAME, upright)),
        overlay_matches(second, first, (upright, FRAME)),
    ):
        np.testing.assert_array_equal(found_in, np.arange(90) < 30)
    # Anywhere else, the same displacement is no overlay's.
    assert not overlay_matches(first, second + np.array([17.0, -11.0]), (FRAME, upright)).any()


def test_few_matches_are_no_overlay() -> None:
    rng = np.random.default_rng(0)
    other = noise(rng, 60)
    for count, expected in ((MIN_SHARP - 1, 0), (MIN_SHARP, MIN_SHARP)):
        putative, _ = together(same_place(rng, logo(rng)[:count]), other)
        assert found(putative).sum() == expected


def test_a_logo_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    for overlay in (logo, big_logo_in_the_middle, printed_frame):
        putative = same_place(rng, overlay(rng))
        edge = check_pair((0, 1), putative, CONFIG, 0)
        assert edge.verdict is Verdict.WATERMARK
        assert edge.num_putative == 0
    assert found(noise(rng, 0)).shape == (0,)


@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(0, 200))
def test_the_order_of_the_matches_does_not_matter(seed: int, static: int, others: int) -> None:
    rng = np.random.default_rng(seed)
    putative, _ = together(same_place(rng, box(rng, static, (0, 0), tuple(rng.uniform(0.1, 1, 2)))), noise(rng, others))
    order = rng.permutation(static + others)
    np.testing.assert_array_equal(found(putative.subset(order)), found(putative)[order])


@given(st.integers(0, 10**6), st.floats(6.5, 60.0))
def test_what_moves_is_no_overlay(seed: int, distance_px: float) -> None:
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, 200)
    xy = random_pixels(rng, 200)
    assert not overlay_matches(xy, xy + distance_px * np.stack([np.cos(angle), np.sin(angle)], axis=1), FRAMES).any()
