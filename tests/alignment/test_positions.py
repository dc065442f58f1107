"""Scales of edges and positions of cameras."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mast3r_sfm.alignment.edges import make_edges
from mast3r_sfm.alignment.positions import MIN_SHARED_POINTS, average_scales, depth_ratios, solve_positions
from mast3r_sfm.errors import DivergedError
from mast3r_sfm.geometry.similarity import align_similarity
from mast3r_sfm.types import Float64, PairMatches
from tests.exact import Scene, centres, ring


def scaled_matches(scene: Scene, pairs: list[tuple[int, int]], seed: int = 0) -> tuple[list[PairMatches], Float64]:
    """Exact edges, each in a scale of its own, and these scales."""
    own = np.exp(np.random.default_rng(seed).normal(0, 1, len(pairs)))
    return [scene.matches(*pair, scale=float(scale)) for pair, scale in zip(pairs, own, strict=True)], own


def all_pairs(number: int) -> list[tuple[int, int]]:
    return list(combinations(range(number), 2))


def solve(scene: Scene, matches: list[PairMatches], scales: Float64, group: np.ndarray) -> tuple[Float64, Float64]:
    edges = make_edges(matches, np.arange(len(scene.poses), dtype=np.int32))
    angle = np.full(len(matches), np.radians(10))
    found, error, history = solve_positions(edges, scene.poses[:, :, :3], scales, group, angle)
    assert len(history) >= 3
    assert all(np.isfinite(history))
    return found, error


def relative_error(found: Float64, scene: Scene) -> float:
    truth = centres(scene.poses)
    size = np.linalg.norm(truth - truth.mean(axis=0), axis=1).max()
    return float(
        np.linalg.norm(align_similarity(found, truth, collinear_ok=True).apply(found) - truth, axis=1).max() / size
    )


def test_ratios_are_those_of_the_scales() -> None:
    matches, own = scaled_matches(ring(6), all_pairs(6))
    ratios = depth_ratios(matches)
    first, second = ratios.edges.T
    # An edge of larger scale has to be shrunk: log(scale of b) − log(scale of a) = log own a − log own b.
    np.testing.assert_allclose(ratios.log_ratio, np.log(own[first] / own[second]), atol=1e-9)
    assert (ratios.weight > 0).all()
    for a, b in ratios.edges:
        assert set(all_pairs(6)[a]) & set(all_pairs(6)[b])


def test_ratios_survive_wrong_depths() -> None:
    matches, own = scaled_matches(ring(4), all_pairs(4))
    rng = np.random.default_rng(0)
    spoilt = []
    for match in matches:
        factor = np.where(rng.random(len(match)) < 0.15, rng.uniform(0.2, 5, len(match)), 1.0)[:, None]
        spoilt.append(
            replace(match, points_first=factor * match.points_first, points_second=factor * match.points_second)
        )
    ratios = depth_ratios(spoilt)
    first, second = ratios.edges.T
    np.testing.assert_allclose(ratios.log_ratio, np.log(own[first] / own[second]), atol=1e-6)


def test_few_shared_points_say_nothing() -> None:
    scene = ring(3)
    pairs = [(0, 1), (1, 2)]
    enough = [replace_first(scene.matches(*pair), MIN_SHARED_POINTS) for pair in pairs]
    assert len(depth_ratios(enough).edges) == 1
    few = [replace_first(scene.matches(*pair), MIN_SHARED_POINTS - 1) for pair in pairs]
    assert len(depth_ratios(few).edges) == 0
    scales, group = average_scales(depth_ratios(few), 2)
    np.testing.assert_array_equal(scales, 1)
    assert len(set(group.tolist())) == 2


def replace_first(match: PairMatches, count: int) -> PairMatches:
    return replace(
        match,
        xy_first=match.xy_first[:count],
        xy_second=match.xy_second[:count],
        confidence=match.confidence[:count],
        points_first=match.points_first[:count],
        points_second=match.points_second[:count],
    )


@pytest.mark.parametrize("seed", range(3))
def test_averaged_scales_undo_those_of_the_edges(seed: int) -> None:
    matches, own = scaled_matches(ring(7, seed=seed), all_pairs(7), seed)
    scales, group = average_scales(depth_ratios(matches), len(matches))
    assert len(set(group.tolist())) == 1
    product = scales * own
    np.testing.assert_allclose(product, np.full(21, product[0]), rtol=1e-3)
    assert np.log(scales).mean() == pytest.approx(0, abs=1e-9)


def test_groups_that_share_no_points_are_kept_apart() -> None:
    scene = ring(6)
    matches, own = scaled_matches(scene, [(0, 1), (1, 2), (3, 4), (4, 5)])
    scales, group = average_scales(depth_ratios(matches), 4)
    assert group[0] == group[1] != group[2] == group[3]
    assert scales[0] * own[0] == pytest.approx(scales[1] * own[1], rel=1e-3)
    assert scales[2] * own[2] == pytest.approx(scales[3] * own[3], rel=1e-3)


@pytest.mark.parametrize("number", [3, 8])
def test_positions_from_exact_edges_are_exact(number: int) -> None:
    scene = ring(number)
    matches, own = scaled_matches(scene, all_pairs(number))
    found, error = solve(scene, matches, 1 / own, np.zeros(len(matches), np.int32))
    assert relative_error(found, scene) < 1e-6
    assert error.max() < 1e-6
    pairs = np.array(all_pairs(number))
    lengths = np.linalg.norm(found[pairs[:, 0]] - found[pairs[:, 1]], axis=1)
    assert lengths.mean() == pytest.approx(1)


def test_the_scale_between_groups_is_solved_for() -> None:
    """Two halves of a ring that share images, but no points: only the closed loop tells how large each is."""
    scene = ring(6)
    pairs = [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (3, 4), (4, 5), (3, 5), (0, 5), (0, 4)]
    group = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], np.int32)
    matches = [scene.matches(*pair, scale=3.0 if part else 1.0) for pair, part in zip(pairs, group, strict=True)]
    found, _ = solve(scene, matches, np.ones(len(pairs)), group)
    assert relative_error(found, scene) < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_wrong_baselines_are_outvoted(seed: int) -> None:
    scene = ring(9, seed=seed)
    matches, own = scaled_matches(scene, all_pairs(9), seed)
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(matches)) < 0.2
    bent = []
    for match, is_wrong in zip(matches, wrong, strict=True):
        pose = match.second_from_first.copy()
        if is_wrong:
            pose[:, 3] = np.linalg.norm(pose[:, 3]) * rng.normal(size=3)
        bent.append(replace(match, second_from_first=pose))
    found, error = solve(scene, bent, 1 / own, np.zeros(len(matches), np.int32))
    assert wrong.sum() >= 3
    assert relative_error(found, scene) < 0.05
    assert np.degrees(error[~wrong]).max() < 6
    assert np.degrees(error[wrong]).max() > 20


def test_infinite_baselines_are_an_error() -> None:
    scene = ring(3)
    edges = make_edges([scene.matches(*pair) for pair in all_pairs(3)], np.arange(3, dtype=np.int32))
    broken = replace(edges, translation=np.full((3, 3), 1e200))
    with np.errstate(all="ignore"), pytest.raises(DivergedError, match="did not converge"):
        solve_positions(broken, scene.poses[:, :, :3], np.ones(3), np.zeros(3, np.int32), np.full(3, 0.2))
