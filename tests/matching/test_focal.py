"""Focal lengths from two-view geometries, where they can be known and where they cannot."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.matching.check import EpipolarEdge, check_pair
from mast3r_sfm.matching.focal import TYPICAL_RATIO, essential_defect, estimate_focal_ratios, turn_defect
from mast3r_sfm.types import Float64, Int32
from tests.exact import CENTRE_PX, HEIGHT_PX, WIDTH_PX, Scene, random_pixels, ring, street, turning, wall, wandering

CONFIG = MatchConfig()
UNKNOWN = np.array([np.nan])


def shared(number: int) -> Int32:
    return np.zeros(number, np.int32)


def edges_of(scene: Scene, focal_px: Float64, noise_px: float = 0.0, outliers: float = 0.0) -> list[EpipolarEdge]:
    """All pairs of a scene, photographed with another focal length per image."""
    edges = []
    for first, second in combinations(range(len(scene.poses)), 2):
        putative, _ = scene.putative(first, second, noise_px=noise_px, outliers=outliers)
        zoomed = replace(
            putative,
            xy_first=(putative.xy_first - CENTRE_PX) * focal_px[first] / scene.focal_px + CENTRE_PX,
            xy_second=(putative.xy_second - CENTRE_PX) * focal_px[second] / scene.focal_px + CENTRE_PX,
        )
        edges.append(check_pair((first, second), zoomed, CONFIG, 0))
    return edges


def estimate(scene: Scene, focal_px: float = 600.0, noise_px: float = 0.0) -> float:
    number = len(scene.poses)
    edges = edges_of(scene, np.full(number, focal_px), noise_px)
    sizes = np.tile([float(WIDTH_PX), float(HEIGHT_PX)], (number, 1))
    return float(estimate_focal_ratios(edges, shared(number), sizes, UNKNOWN)[0])


@pytest.mark.parametrize("focal_px", [320.0, 480.0, 600.0, 900.0, 1500.0])
def test_a_shared_focal_length_is_found(focal_px: float) -> None:
    assert estimate(wandering(5, 1), focal_px) == pytest.approx(focal_px / WIDTH_PX, rel=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_noise_moves_it_little(seed: int) -> None:
    assert estimate(wandering(6, seed), 500.0, noise_px=0.5) == pytest.approx(500 / WIDTH_PX, rel=0.03)


@pytest.mark.parametrize("focal_px", [480.0, 600.0, 900.0])
def test_turns_tell_it_too(focal_px: float) -> None:
    assert estimate(turning(5), focal_px) == pytest.approx(focal_px / WIDTH_PX, rel=0.01)


def test_single_wrong_pairs_do_not_move_it() -> None:
    scene = wandering(6, 2)
    edges = edges_of(scene, np.full(6, 600.0))
    rng = np.random.default_rng(0)
    wrong = rng.choice(len(edges), 3, replace=False)
    for number in wrong:
        left, values, right = np.linalg.svd(rng.normal(size=(3, 3)))
        arbitrary = left @ np.diag([values[0], values[1], 0]) @ right
        edges[number] = replace(edges[number], fundamental=arbitrary)
    sizes = np.tile([float(WIDTH_PX), float(HEIGHT_PX)], (6, 1))
    assert estimate_focal_ratios(edges, shared(6), sizes, UNKNOWN)[0] == pytest.approx(600 / WIDTH_PX, rel=0.01)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise_px", [0.0, 0.5])
def test_two_cameras_each_get_their_own(seed: int, noise_px: float) -> None:
    focal_px = np.array([450.0, 800.0])
    camera = np.arange(6, dtype=np.int32) % 2
    edges = edges_of(wandering(6, seed), focal_px[camera], noise_px)
    sizes = np.tile([float(WIDTH_PX), float(HEIGHT_PX)], (6, 1))
    ratios = estimate_focal_ratios(edges, camera, sizes, np.array([np.nan, np.nan]))
    np.testing.assert_allclose(WIDTH_PX * ratios, focal_px, rtol=0.03)


def test_a_known_focal_length_stays_and_helps() -> None:
    focal_px = np.array([450.0, 800.0])
    camera = np.arange(6, dtype=np.int32) % 2
    edges = edges_of(wandering(6, 0), focal_px[camera])
    sizes = np.tile([float(WIDTH_PX), float(HEIGHT_PX)], (6, 1))
    ratios = estimate_focal_ratios(edges, camera, sizes, np.array([450 / WIDTH_PX, np.nan]))
    assert ratios[0] == 450 / WIDTH_PX
    assert ratios[1] == pytest.approx(800 / WIDTH_PX, rel=0.01)
    wrong = np.array([2.5, 0.4])
    np.testing.assert_array_equal(estimate_focal_ratios(edges, camera, sizes, wrong), wrong)


def test_a_plane_tells_nothing() -> None:
    assert estimate(wall(5), 800.0) == TYPICAL_RATIO
    assert estimate(wall(5), 800.0, noise_px=0.5) == TYPICAL_RATIO


@pytest.mark.parametrize("noise_px", [0.0, 0.3])
def test_forward_motion_stays_near_the_typical_ratio(noise_px: float) -> None:
    assert 0.75 < estimate(street(5), 500.0, noise_px=noise_px) < 1.35


def test_nothing_to_go_by_gives_the_typical_ratio() -> None:
    assert estimate_focal_ratios([], shared(2), np.full((2, 2), 100.0), UNKNOWN)[0] == TYPICAL_RATIO
    rng = np.random.default_rng(0)
    putative, _ = ring(2).putative(0, 1)
    scattered = replace(putative, xy_second=random_pixels(rng, len(putative.xy_second)))
    weak = check_pair((0, 1), scattered, CONFIG, 0)
    sizes = np.tile([float(WIDTH_PX), float(HEIGHT_PX)], (2, 1))
    assert estimate_focal_ratios([weak], shared(2), sizes, UNKNOWN)[0] == TYPICAL_RATIO


def test_a_camera_without_pairs_gets_the_typical_ratio() -> None:
    edges = edges_of(wandering(4, 0), np.full(4, 480.0))
    camera = np.array([0, 0, 0, 0, 1], np.int32)
    sizes = np.tile([float(WIDTH_PX), float(HEIGHT_PX)], (5, 1))
    ratios = estimate_focal_ratios(edges, camera, sizes, np.array([np.nan, np.nan]))
    assert ratios[0] == pytest.approx(0.75, rel=0.01)
    assert ratios[1] == TYPICAL_RATIO


def test_an_upright_and_a_lying_photo_share_a_ratio_of_the_long_side() -> None:
    scene = wandering(4, 3)
    edges = edges_of(scene, np.full(4, 600.0))
    swapped = [
        replace(edge, xy_first=edge.xy_first[:, ::-1], xy_second=edge.xy_second[:, ::-1], fundamental=_transposed(edge))
        for edge in edges
    ]
    sizes = np.tile([float(HEIGHT_PX), float(WIDTH_PX)], (4, 1))
    assert estimate_focal_ratios(swapped, shared(4), sizes, UNKNOWN)[0] == pytest.approx(600 / WIDTH_PX, rel=0.01)


def _transposed(edge: EpipolarEdge) -> Float64:
    swap = np.eye(3)[[1, 0, 2]]
    return swap @ edge.fundamental @ swap


def test_the_defects_vanish_at_the_truth_only() -> None:
    scene = wandering(2, 0)
    pose = scene.second_from_first(0, 1)
    x, y, z = pose[:, 3]
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ pose[:, :3]
    for truth_first, truth_second in ((500.0, 500.0), (400.0, 900.0)):
        one, two = np.diag([truth_first, truth_first, 1.0]), np.diag([truth_second, truth_second, 1.0])
        fundamental = np.linalg.inv(two).T @ essential @ np.linalg.inv(one)
        homography = two @ pose[:, :3] @ np.linalg.inv(one)
        for defect, matrix in ((essential_defect, fundamental), (turn_defect, homography)):
            exact = defect(matrix[None], np.array([truth_first]), np.array([truth_second]))
            assert exact == pytest.approx([0], abs=1e-9)
            off = defect(matrix[None], np.array([1.3 * truth_first]), np.array([truth_second]))
            assert 0.005 < off[0] < 1
