"""The align stage: exact where the pairs are, bounded where they are noisy, and unmoved by nonsense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mast3r_sfm.alignment import stage
from mast3r_sfm.alignment.stage import Pinholes, agreeing_matches, align, focal_lengths_moved, with_focal_lengths
from mast3r_sfm.config import AlignConfig
from mast3r_sfm.evaluation.pairs import measure_pairs
from mast3r_sfm.geometry.rigid import make_pose, rotation_from_axis_angle, transform_points
from mast3r_sfm.geometry.similarity import Similarity, align_similarity
from mast3r_sfm.types import AlignmentResult, PairMatches, Verdict
from tests.exact import Scene, centres, poses_by_name, ring, turned_wrong, turning

CONFIG = AlignConfig()


def exact_matches(scene: Scene, pairs: Sequence[tuple[int, int]], seed: int = 0) -> list[PairMatches]:
    """Every pair in a scale of its own."""
    rng = np.random.default_rng(seed)
    return [scene.matches(*pair, scale=float(np.exp(rng.normal()))) for pair in pairs]


def all_pairs(number: int) -> list[tuple[int, int]]:
    return list(combinations(range(number), 2))


def noisy(match: PairMatches, rng: np.random.Generator, turn_deg: float, scale: float) -> PairMatches:
    """The pose turned by about an angle, its baseline and every depth off by a share."""
    turn = rotation_from_axis_angle(rng.normal(0, np.radians(turn_deg) / np.sqrt(3), 3))
    rotation = turn @ match.second_from_first[:, :3]
    translation = match.second_from_first[:, 3] * np.exp(scale * rng.normal())
    pose = make_pose(rotation, translation)
    points = match.points_first * np.exp(scale * rng.normal(size=(len(match), 1)))
    return replace(match, second_from_first=pose, points_first=points, points_second=transform_points(pose, points))


def without_depth(match: PairMatches, verdict: Verdict) -> PairMatches:
    none = np.zeros((0, 3))
    return replace(match, verdict=verdict, points_first=none, points_second=none)


def errors(result: AlignmentResult, scene: Scene) -> tuple[float, float, float]:
    """Largest rotation and direction error over all pairs in degrees; largest centre error over the scene's size."""
    estimated = poses_by_name(result.images, result.cam_from_world)
    pairs = measure_pairs([estimated], poses_by_name(range(len(scene.poses)), scene.poses), sorted(estimated))
    return pairs.rotation_deg.max(), pairs.translation_deg.max(), centre_error(result, scene)


def fit(result: AlignmentResult, scene: Scene) -> Similarity:
    return align_similarity(centres(result.cam_from_world), centres(scene.poses[result.images]), collinear_ok=True)


def centre_error(result: AlignmentResult, scene: Scene) -> float:
    found, truth = centres(result.cam_from_world), centres(scene.poses[result.images])
    size = max(float(np.linalg.norm(truth - centre, axis=1).max()) for centre in truth)
    if len(truth) < 3:
        return 0.0  # two centres always fit
    return float(np.linalg.norm(fit(result, scene).apply(found) - truth, axis=1).max()) / size


@pytest.mark.parametrize("number", [2, 3, 10])
def test_exact_pairs_give_exact_poses_up_to_a_similarity(number: int) -> None:
    scene = ring(number, turn_deg=40 * number if number < 9 else 360)
    (result,) = align(exact_matches(scene, all_pairs(number)), number, CONFIG)
    np.testing.assert_array_equal(result.images, np.arange(number))
    np.testing.assert_array_equal(result.edges, np.arange(len(all_pairs(number))))
    assert max(errors(result, scene)) < 1e-5
    assert result.residual_deg.max() < 1e-6
    assert result.history[-1] < 1e-6
    if number > 2:
        # The rotation of the similarity is that of the frames.
        turn = fit(result, scene).rotation
        np.testing.assert_allclose(result.cam_from_world[:, :, :3] @ turn.T, scene.poses[:, :, :3], atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_noise_stays_bounded(seed: int) -> None:
    scene = ring(10, seed=seed)
    rng = np.random.default_rng(seed)
    matches = [noisy(match, rng, 1.0, 0.05) for match in exact_matches(scene, all_pairs(10), seed)]
    (result,) = align(matches, 10, CONFIG)
    assert len(result.images) == 10
    turn, direction, centre = errors(result, scene)
    assert 0.05 < turn < 1.5
    assert 0.05 < direction < 2.5
    assert 0.0005 < centre < 0.03
    assert 0.2 < result.residual_deg.mean() < 1.5


@pytest.mark.parametrize("seed", range(6))
def test_a_fifth_of_nonsense_is_dropped(seed: int) -> None:
    scene = ring(10, seed=seed)
    rng = np.random.default_rng([seed, 1])
    wrong = np.flatnonzero(rng.random(45) < 0.2)
    matches = [
        turned_wrong(match, rng) if edge in wrong else noisy(match, rng, 0.5, 0.02)
        for edge, match in enumerate(exact_matches(scene, all_pairs(10), seed))
    ]
    (result,) = align(matches, 10, CONFIG)
    assert len(wrong) >= 4
    assert set(result.edges.tolist()) == set(range(45)) - set(wrong.tolist())
    turn, direction, centre = errors(result, scene)
    assert turn < 1.0
    assert direction < 2.0
    assert centre < 0.02


@pytest.mark.parametrize("seed", range(9))
def test_a_third_of_nonsense_that_looks_as_good_is_told_by_its_triangles(seed: int) -> None:
    scene = ring(10, seed=seed)
    rng = np.random.default_rng([seed, 1])
    wrong = rng.random(45) < 0.3
    matches = [
        turned_wrong(match, rng) if is_wrong else match
        for match, is_wrong in zip(exact_matches(scene, all_pairs(10), seed), wrong, strict=True)
    ]
    (result,) = align(matches, 10, CONFIG)
    assert len(result.images) == 10
    assert not set(result.edges.tolist()) & set(np.flatnonzero(wrong).tolist())
    assert centre_error(result, scene) < 0.01


@pytest.mark.parametrize("seed", range(6))
def test_right_rotations_with_wrong_baselines_are_seen_through(seed: int) -> None:
    """As a row of equal windows does: the camera seems not to have moved, or to have moved elsewhere."""
    scene = ring(9, seed=seed)
    rng = np.random.default_rng(seed)
    matches = exact_matches(scene, all_pairs(9), seed)
    for edge in rng.choice(len(matches), 5, replace=False):
        pose = matches[edge].second_from_first
        moved = np.linalg.norm(pose[:, 3]) * rng.normal(size=3)
        matches[edge] = replace(matches[edge], second_from_first=make_pose(pose[:, :3], moved))
    (result,) = align(matches, 9, CONFIG)
    assert len(result.images) == 9
    assert centre_error(result, scene) < 0.03


@pytest.mark.parametrize("number", [3, 8])
def test_a_chain_holds_together(number: int) -> None:
    """No triangle checks anything: points that neighbouring pairs share carry the scale along."""
    scene = ring(number, turn_deg=30 * number)
    (result,) = align(exact_matches(scene, [(i, i + 1) for i in range(number - 1)]), number, CONFIG)
    assert len(result.images) == number
    assert max(errors(result, scene)) < 1e-5


def test_parts_that_nothing_ties_are_results_of_their_own() -> None:
    scene = ring(9)
    small, large = [(0, 3), (3, 7), (0, 7)], list(combinations([1, 2, 4, 5, 8], 2))
    results = align(exact_matches(scene, [*small, *large]), 9, CONFIG)
    assert [result.images.tolist() for result in results] == [[1, 2, 4, 5, 8], [0, 3, 7]]
    assert results[0].edges.tolist() == list(range(3, 13))
    assert results[1].edges.tolist() == [0, 1, 2]
    for result in results:
        assert max(errors(result, scene)) < 1e-5


def test_equal_parts_come_in_the_order_of_their_images() -> None:
    results = align(exact_matches(ring(4), [(1, 3), (0, 2)]), 4, CONFIG)
    assert [result.images.tolist() for result in results] == [[0, 2], [1, 3]]


def test_parts_that_are_too_small_are_left_out() -> None:
    matches = exact_matches(ring(5), [(0, 1), (2, 3), (3, 4), (2, 4)])
    assert [len(result.images) for result in align(matches, 5, AlignConfig(min_images=3))] == [3]
    assert align(matches, 5, AlignConfig(min_images=4)) == []


@pytest.mark.parametrize("verdict", [Verdict.PURE_ROTATION, Verdict.WEAK, Verdict.TOO_FEW])
def test_pairs_without_depth_tie_nothing(verdict: Verdict) -> None:
    scene = ring(4)
    matches = exact_matches(scene, [(0, 1), (1, 2), (0, 2), (2, 3)])
    matches[3] = without_depth(matches[3], verdict)
    (result,) = align(matches, 4, CONFIG)
    assert result.images.tolist() == [0, 1, 2]
    assert result.edges.tolist() == [0, 1, 2]
    assert align([without_depth(match, verdict) for match in matches], 4, CONFIG) == []


def test_no_pairs_no_parts() -> None:
    assert align([], 5, CONFIG) == []


def test_a_planar_pair_counts() -> None:
    scene = ring(3)
    matches = [replace(match, verdict=Verdict.PLANAR) for match in exact_matches(scene, all_pairs(3))]
    (result,) = align(matches, 3, CONFIG)
    assert max(errors(result, scene)) < 1e-5


def test_scales_of_pairs_do_not_matter() -> None:
    scene = ring(6)
    one = align([scene.matches(*pair) for pair in all_pairs(6)], 6, CONFIG)[0]
    other = align(exact_matches(scene, all_pairs(6), seed=3), 6, CONFIG)[0]
    np.testing.assert_allclose(one.cam_from_world, other.cam_from_world, atol=1e-4)
    # The frame's unit is the mean baseline.
    first, second = np.array(all_pairs(6)).T
    where = centres(one.cam_from_world)
    assert np.linalg.norm(where[first] - where[second], axis=1).mean() == pytest.approx(1)


def test_the_same_pairs_give_the_same_poses() -> None:
    scene = ring(8)
    rng = np.random.default_rng(0)
    matches = [noisy(match, rng, 1.0, 0.05) for match in exact_matches(scene, all_pairs(8))]
    one, two = (align(matches, 8, CONFIG)[0] for _ in range(2))
    np.testing.assert_array_equal(one.cam_from_world, two.cam_from_world)


def test_two_scenes_and_a_wrong_pair_between_them_stay_right_inside() -> None:
    """A single wrong pair cannot be refuted; it must not spoil what is known of either side."""
    scene = ring(8)
    inside = [*combinations(range(4), 2), *combinations(range(4, 8), 2)]
    matches = exact_matches(scene, inside)
    matches.append(turned_wrong(scene.matches(1, 6), np.random.default_rng(0)))
    results = align(matches, 8, CONFIG)
    for part in (range(4), range(4, 8)):
        (holder,) = [result for result in results if set(part) <= set(result.images.tolist())]
        rows = np.searchsorted(holder.images, list(part))
        alone = replace(
            holder,
            images=holder.images[rows],
            cam_from_world=holder.cam_from_world[rows],
            residual_deg=holder.residual_deg[rows],
            num_edges=holder.num_edges[rows],
        )
        assert max(errors(alone, scene)) < 1e-3


@pytest.mark.parametrize("seed", range(6))
def test_the_last_of_contradicting_pairs_joins_nothing(seed: int) -> None:
    scene = ring(8)
    rng = np.random.default_rng(seed)
    matches = exact_matches(scene, [*combinations(range(4), 2), *combinations(range(4, 8), 2)])
    matches += [turned_wrong(scene.matches(*pair), rng) for pair in ((0, 5), (1, 6), (2, 4), (3, 7))]
    results = align(matches, 8, CONFIG)
    assert [result.images.tolist() for result in results] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_turning_camera_alone_gives_nothing() -> None:
    scene = turning(4)
    matches = [without_depth(scene.matches(*pair), Verdict.PURE_ROTATION) for pair in all_pairs(4)]
    assert align(matches, 4, CONFIG) == []


@pytest.mark.parametrize(
    ("excess", "kept"),
    [
        ([0.1, 0.5, 1.0], [True, True, True]),
        ([0.1, 0.5, 1.5], [True, True, False]),
        ([0.9, 2.0, 5.9], [True, False, False]),  # 5.9 / 3 < 2.0
        ([0.9, 2.0, 6.1], [True, True, False]),  # the worst first: it may be the other's fault
        ([30.0, 9.0, 11.0], [False, True, False]),
    ],
)
def test_the_worst_go_first(excess: list[float], kept: list[bool]) -> None:
    np.testing.assert_array_equal(stage._best_first(np.array(excess)), kept)


def test_poses_and_the_focal_length_are_refined_by_all_matches() -> None:
    """Where the points are triangulated from matches, pairs inherit a wrong focal length; the matches do not."""
    scene = ring(7, turn_deg=150)
    rng = np.random.default_rng(2)
    matches = [noisy(match, rng, 1.0, 0.05) for match in exact_matches(scene, all_pairs(7))]
    pinholes = Pinholes(rig=scene.rig(photo_scale=2.0, focal_factor=0.85), pixel_scale=2.0, own_depth=False)
    larger = [replace(match, xy_first=2 * match.xy_first, xy_second=2 * match.xy_second) for match in matches]
    (averaged,) = align(larger, 7, CONFIG)
    (refined,) = align(larger, 7, CONFIG, pinholes)
    assert averaged.focal_px.shape == (0,)
    np.testing.assert_allclose(refined.focal_px, 1200.0, rtol=1e-3)
    assert with_focal_lengths(pinholes.rig, [refined]).cameras[0].params[0] == pytest.approx(1200.0, rel=1e-3)
    assert errors(averaged, scene)[0] > 0.3
    assert max(errors(refined, scene)[:2]) < 0.03
    assert centre_error(refined, scene) < 1e-3
    # The pairs' own rotations are off by a degree, and the result says so.
    assert 0.3 < refined.residual_deg.min() <= refined.residual_deg.max() < 3
    placed, ends = centres(refined.cam_from_world), np.array(all_pairs(7))
    assert np.linalg.norm(placed[ends[:, 1]] - placed[ends[:, 0]], axis=1).mean() == pytest.approx(1.0)
    assert refined.stop_reason.startswith("epipolar errors settled after")
    np.testing.assert_array_equal(refined.edges, averaged.edges)


def test_edges_that_hold_an_image_are_counted() -> None:
    """Not those that contradict the whole."""
    scene = ring(6, turn_deg=150)
    matches = exact_matches(scene, all_pairs(6))
    wrong = all_pairs(6).index((1, 4))
    matches[wrong] = turned_wrong(matches[wrong], np.random.default_rng(0))
    for pinholes in (None, Pinholes(rig=scene.rig(), pixel_scale=1.0, own_depth=False)):
        (result,) = align(matches, 6, CONFIG, pinholes)
        assert result.num_edges.tolist() == [5, 4, 5, 5, 4, 5]
        assert wrong not in result.edges


@pytest.mark.parametrize(
    ("factor", "moved"), [(1.0, False), (1.025, False), (0.975, False), (1.035, True), (0.6, True)]
)
def test_pairs_are_calibrated_anew_where_focal_lengths_moved(factor: float, moved: bool) -> None:
    rig = ring(3).rig()
    assert focal_lengths_moved(rig, ring(3).rig(focal_factor=factor)) == moved


def test_matches_that_agree_are_those_of_the_edges_of_all_parts() -> None:
    scene = ring(8)
    matches = exact_matches(scene, [*combinations(range(5), 2), *combinations(range(5, 8), 2)])
    matches[5] = turned_wrong(matches[5], np.random.default_rng(0))
    parts = align(matches, 8, CONFIG)
    assert len(parts) == 2
    assert agreeing_matches(parts, matches) == sum(len(match) for match in matches) - len(matches[5])
    assert agreeing_matches([], matches) == 0
