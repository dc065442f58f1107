"""The calibrated check: relative pose, points, and the kind of link."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.evaluation.pairs import direction_angle
from mast3r_sfm.geometry.rigid import angle_between_rotations, make_pose, transform_points
from mast3r_sfm.geometry.similarity import align_similarity
from mast3r_sfm.matching.calibrated import View, calibrate_pair
from mast3r_sfm.matching.check import EpipolarEdge, MatchedPoints, Putative, check_pair
from mast3r_sfm.synthetic.covisibility import correspond
from mast3r_sfm.types import Float64, Int64, PairMatches, Verdict
from tests.exact import CENTRE_PX, Scene, random_pixels, ring, street, turning, wall
from tests.scenes import object_views, second_from_first

CONFIG = MatchConfig()


def view(scale: float = 1.0, focal_px: float = 600.0) -> View:
    return View(focal_px=focal_px, centre_px=CENTRE_PX, scale=scale)


def check(scene: Scene, *, outliers: float = 0.3, noise_px: float = 0.0, seed: int = 0) -> EpipolarEdge:
    return check_pair((0, 1), scene.putative(0, 1, outliers=outliers, noise_px=noise_px, seed=seed)[0], CONFIG, seed)


def pose_errors(match: PairMatches, truth: Float64) -> tuple[float, float]:
    """Degrees by which rotation and direction miss."""
    rotation = angle_between_rotations(match.second_from_first[:, :3], truth[:, :3])
    return float(np.degrees(rotation)), float(np.degrees(direction_angle(match.second_from_first[:, 3], truth[:, 3])))


def true_points(scene: Scene, match: PairMatches) -> tuple[np.ndarray, Float64]:
    """Which matches are exact, and the world points of those."""
    distance = np.linalg.norm(match.xy_first[:, None] - scene.project(0)[None], axis=2)
    other = np.linalg.norm(match.xy_second[:, None] - scene.project(1)[None], axis=2)
    nearest = (distance + other).argmin(axis=1)
    exact = (distance + other)[np.arange(len(match)), nearest] < 1e-6
    return exact, scene.points[nearest[exact]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("noise_px", "turn_deg", "direction_deg"), [(0.0, 1e-3, 1e-3), (0.3, 0.2, 1.0)])
def test_a_scene_with_depth(seed: int, noise_px: float, turn_deg: float, direction_deg: float) -> None:
    scene = ring(2, turn_deg=40, seed=seed)
    edge = check(scene, outliers=0.3 if noise_px else 0.0, noise_px=noise_px, seed=seed)
    match = calibrate_pair(edge, view(), view(), CONFIG, seed)
    assert match.verdict is Verdict.GOOD
    turn, direction = pose_errors(match, scene.second_from_first(0, 1))
    assert turn < turn_deg
    assert direction < direction_deg
    assert np.linalg.norm(match.second_from_first[:, 3]) == pytest.approx(1)


def test_points_are_the_true_ones_up_to_scale() -> None:
    scene = ring(2, turn_deg=40)
    match = calibrate_pair(check(scene), view(), view(), CONFIG, 0)
    exact, world = true_points(scene, match)
    assert 250 < exact.sum() <= len(world)
    truth = transform_points(scene.poses[0], world)
    baseline = np.linalg.norm(scene.second_from_first(0, 1)[:, 3])
    np.testing.assert_allclose(baseline * match.points_first[exact], truth, atol=1e-4)
    similarity = align_similarity(match.points_first[exact], truth)
    assert similarity.scale == pytest.approx(baseline, rel=1e-4)
    # The second camera's points are the same points, in its frame and in the same scale.
    moved = transform_points(match.second_from_first, match.points_first)
    np.testing.assert_allclose(moved, match.points_second, atol=1e-9)
    assert (match.points_first[:, 2] > 0).all()
    assert (match.points_second[:, 2] > 0).all()


def test_photo_pixels_are_scaled_network_pixels() -> None:
    scene = ring(2, turn_deg=40)
    edge = check(scene)
    plain = calibrate_pair(edge, view(), view(), CONFIG, 0)
    scaled = calibrate_pair(edge, view(2.5), view(4.0), CONFIG, 0)
    np.testing.assert_allclose(scaled.xy_first, 2.5 * plain.xy_first)
    np.testing.assert_allclose(scaled.xy_second, 4.0 * plain.xy_second)
    # The size of the photo changes nothing else.
    np.testing.assert_array_equal(scaled.points_first, plain.points_first)
    np.testing.assert_array_equal(scaled.second_from_first, plain.second_from_first)


def test_each_camera_has_its_focal_length() -> None:
    scene = ring(2, turn_deg=40)
    putative, _ = scene.putative(0, 1, outliers=0.2)
    zoomed = replace(putative, xy_second=(putative.xy_second - CENTRE_PX) * 1.5 + CENTRE_PX)
    match = calibrate_pair(check_pair((0, 1), zoomed, CONFIG, 0), view(), view(focal_px=900.0), CONFIG, 0)
    turn, direction = pose_errors(match, scene.second_from_first(0, 1))
    assert match.verdict is Verdict.GOOD
    assert max(turn, direction) < 0.05


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise_px", [0.0, 0.5])
def test_a_turn_is_a_pure_rotation_without_depth(seed: int, noise_px: float) -> None:
    scene = turning(2, seed=seed)
    match = calibrate_pair(check(scene, noise_px=noise_px), view(3.0), view(3.0), CONFIG, seed)
    assert match.verdict is Verdict.PURE_ROTATION
    assert len(match) > 60
    assert match.points_first.shape == match.points_second.shape == (0, 3)
    truth = scene.second_from_first(0, 1)
    assert pose_errors(match, truth)[0] < (1e-6 if noise_px == 0 else 0.2)
    np.testing.assert_array_equal(match.second_from_first[:, 3], 0)
    assert match.xy_first.max() > 640  # photo pixels


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("noise_px", "turn_deg", "direction_deg"), [(0.0, 1e-3, 1e-3), (0.3, 0.3, 1.0)])
def test_a_plane_with_parallax_is_planar(seed: int, noise_px: float, turn_deg: float, direction_deg: float) -> None:
    scene = wall(2, seed=seed)
    edge = check(scene, outliers=0.3 if noise_px else 0.0, noise_px=noise_px, seed=seed)
    match = calibrate_pair(edge, view(), view(), CONFIG, seed)
    assert match.verdict is Verdict.PLANAR
    assert len(match.points_first) == len(match) > 150
    turn, direction = pose_errors(match, scene.second_from_first(0, 1))
    assert turn < turn_deg
    assert direction < direction_deg


def test_forward_motion_is_no_rotation() -> None:
    scene = street(3)
    match = calibrate_pair(check(scene, noise_px=0.3), view(), view(), CONFIG, 0)
    assert match.verdict.has_depth
    turn, direction = pose_errors(match, scene.second_from_first(0, 1))
    assert turn < 0.1
    assert direction < 2.0


def test_points_of_a_pointmap_model_are_kept() -> None:
    scene = ring(2, turn_deg=40)
    putative, is_true = scene.putative(0, 1, outliers=0.3)
    rng = np.random.default_rng(0)
    # A pointmap in a scale of its own, and not where two rays would meet.
    points_first = 7.0 * rng.uniform([-1, -1, 3], [1, 1, 6], (len(is_true), 3))
    truth = scene.second_from_first(0, 1)
    points_second = transform_points(make_pose(truth[:, :3], 7.0 * truth[:, 3]), points_first)
    given = replace(
        putative,
        points=lambda chosen: MatchedPoints(
            first=points_first[chosen], second=points_second[chosen], decode_disagreement_deg=1.5
        ),
    )
    match = calibrate_pair(check_pair((0, 1), given, CONFIG, 0), view(), view(), CONFIG, 0)
    rows = {tuple(row) for row in np.concatenate([points_first, points_second], axis=1).tolist()}
    assert {tuple(row) for row in np.concatenate([match.points_first, match.points_second], axis=1).tolist()} <= rows
    assert len(match) >= 0.95 * is_true.sum()
    np.testing.assert_allclose(match.second_from_first[:, :3], truth[:, :3], atol=1e-9)
    np.testing.assert_allclose(match.second_from_first[:, 3], 7.0 * truth[:, 3], atol=1e-8)
    assert match.decode_disagreement_deg == 1.5


@pytest.mark.parametrize("along", [np.zeros(3), np.array([1.0, 2.0, 3.0])])
def test_points_in_one_place_or_on_one_line_fix_no_pose(along: Float64) -> None:
    """Whatever the check thought of more of them."""
    putative, _ = ring(2, turn_deg=40).putative(0, 1, outliers=0.3)
    points = np.array([0.1, 0.2, 4.0]) + np.linspace(0, 1, len(putative.xy_first))[:, None] * along

    def given(chosen: Int64) -> MatchedPoints:
        return MatchedPoints(first=points[chosen], second=points[chosen], decode_disagreement_deg=0.0)

    edge = check_pair((0, 1), replace(putative, points=given), CONFIG, 0)
    match = calibrate_pair(edge, view(), view(), CONFIG, 0)
    assert edge.verdict is Verdict.GOOD
    assert match.verdict is Verdict.WEAK
    assert len(match) == 0


@pytest.mark.parametrize("smooth", [False, True])
def test_the_best_matches_of_a_pointmap_may_lie_side_by_side(smooth: bool) -> None:
    """Equally confident ones stand row by row, and confidence changes slowly over the image."""
    views = list(object_views(10).values())
    shares, turns = [], []
    for number, (first, second) in enumerate(zip(views, views[2:], strict=False)):
        rng = np.random.default_rng(number)
        xy, seen = correspond(first, second)
        grid = np.stack(np.meshgrid(np.arange(128) + 0.5, np.arange(96) + 0.5), axis=-1)
        confidence = np.exp(gaussian_filter(rng.normal(size=seen.shape), 12) * 30 * smooth)[seen].astype(np.float32)
        world = first.points_world[seen]
        points = MatchedPoints(
            first=transform_points(first.cam_from_world, world),
            second=transform_points(second.cam_from_world, world),
            decode_disagreement_deg=0.0,
        )
        putative = Putative(
            xy_first=grid[seen] + rng.normal(size=(seen.sum(), 2)),
            xy_second=xy[seen] + rng.normal(size=(seen.sum(), 2)),
            confidence=confidence,
            is_distinct=np.ones(len(world), np.bool_),
            points=partial(_chosen_points, points),
        )
        cameras = [View(focal_px=one.K[0, 0], centre_px=one.K[:2, 2], scale=1.0) for one in (first, second)]
        match = calibrate_pair(check_pair((0, 1), putative, CONFIG, 0), *cameras, CONFIG, 0)
        assert match.verdict.has_depth
        shares.append(len(match) / len(world))
        turns.append(pose_errors(match, second_from_first(first, second))[0])
    # Of two Gaussian errors, one in each image, 96 % are within the bound of two pixels.
    assert 0.85 < min(shares) <= max(shares) < 0.99
    assert max(turns) < 1e-3


def _chosen_points(points: MatchedPoints, chosen: Int64) -> MatchedPoints:
    return replace(points, first=points.first[chosen], second=points.second[chosen])


def test_what_is_no_link_stays_none() -> None:
    rng = np.random.default_rng(0)
    putative, _ = ring(2).putative(0, 1)
    weak = check_pair((0, 1), replace(putative, xy_second=random_pixels(rng, len(putative.xy_second))), CONFIG, 0)
    few = check_pair((0, 1), putative.subset(np.arange(10)), CONFIG, 0)
    for edge, verdict in ((weak, Verdict.WEAK), (few, Verdict.TOO_FEW)):
        match = calibrate_pair(edge, view(), view(), CONFIG, 0)
        assert match.verdict is verdict
        assert len(match) == 0
        np.testing.assert_array_equal(match.second_from_first, np.eye(3, 4))


def test_the_same_seed_gives_the_same_pose() -> None:
    edge = check(ring(2, turn_deg=40), noise_px=0.5)
    one, two = (calibrate_pair(edge, view(), view(), CONFIG, 3) for _ in range(2))
    np.testing.assert_array_equal(one.second_from_first, two.second_from_first)
    np.testing.assert_array_equal(one.points_first, two.points_first)
