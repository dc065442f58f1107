"""Photos that were all taken from one point: exact where their matches are, and as sure as it is said to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mast3r_sfm.alignment.turning import align_turns
from mast3r_sfm.config import AlignConfig
from mast3r_sfm.geometry.rigid import angle_between_rotations, rotation_from_axis_angle
from mast3r_sfm.types import AlignmentResult, Float64, Int32, PairMatches, Rig, Verdict
from tests.exact import Scene, turning

NOBODY: Int32 = np.zeros(0, np.int32)
CONFIG = AlignConfig()


def turns(scene: Scene, pairs: Sequence[tuple[int, int]], noise_px: float = 0.0, seed: int = 0) -> list[PairMatches]:
    """Pairs as the check leaves them where there is no depth; their rotations are a degree off."""
    rng = np.random.default_rng(seed)
    found = []
    for pair in pairs:
        match = scene.matches(*pair)
        pose = match.second_from_first.copy()
        pose[:, :3] = rotation_from_axis_angle(rng.normal(0, np.radians(0.5), 3)) @ pose[:, :3]
        pose[:, 3] = 0.0
        found.append(
            replace(
                match,
                verdict=Verdict.PURE_ROTATION,
                xy_first=match.xy_first + rng.normal(0, noise_px, match.xy_first.shape),
                xy_second=match.xy_second + rng.normal(0, noise_px, match.xy_second.shape),
                points_first=np.zeros((0, 3)),
                points_second=np.zeros((0, 3)),
                second_from_first=pose,
            )
        )
    return found


def known(rig: Rig) -> Rig:
    return replace(rig, cameras=tuple(replace(camera, focal_is_known=True) for camera in rig.cameras))


def misses(result: AlignmentResult, scene: Scene) -> Float64:
    """Degrees by which the relative rotations of all pairs of images are off."""
    first, second = np.triu_indices(len(result.images), 1)
    relative = [
        poses[second, :, :3] @ poses[first, :, :3].transpose(0, 2, 1)
        for poses in (result.cam_from_world, scene.poses[result.images])
    ]
    return np.degrees(angle_between_rotations(relative[0], relative[1]))


@pytest.mark.parametrize("factor", [0.9, 1.15])
def test_exact_matches_give_exact_turns_and_the_focal_length(factor: float) -> None:
    scene = turning(6)
    (result,) = align_turns(
        turns(scene, list(combinations(range(6), 2))), NOBODY, scene.rig(focal_factor=factor), 1.0, CONFIG
    )
    assert result.images.tolist() == list(range(6))
    assert result.edges.tolist() == list(range(15))
    # The weak prior on the focal length pulls by as little as it is weak.
    assert misses(result, scene).max() < 0.01
    assert result.focal_px == pytest.approx(np.full(6, scene.focal_px), rel=2e-4)
    assert not result.cam_from_world[:, :, 3].any()
    assert result.stop_reason.startswith("pure rotation")
    assert 0.05 < np.median(result.residual_deg) < 3.0
    assert len(result.position_sigma) == 0


def test_a_known_focal_length_stays() -> None:
    scene = turning(4)
    matches = turns(scene, list(combinations(range(4), 2)))
    (result,) = align_turns(matches, NOBODY, known(scene.rig()), 1.0, CONFIG)
    np.testing.assert_array_equal(result.focal_px, np.full(4, scene.focal_px))
    assert misses(result, scene).max() < 1e-5


def test_larger_photos_give_the_same_turns() -> None:
    scene = turning(4)
    matches = turns(scene, list(combinations(range(4), 2)), noise_px=1.0)
    large = [replace(match, xy_first=3 * match.xy_first, xy_second=3 * match.xy_second) for match in matches]
    (one,) = align_turns(matches, NOBODY, scene.rig(), 1.0, CONFIG)
    (other,) = align_turns(large, NOBODY, scene.rig(photo_scale=3.0), 3.0, CONFIG)
    np.testing.assert_allclose(one.cam_from_world, other.cam_from_world, atol=1e-9)
    np.testing.assert_allclose(3 * one.focal_px, other.focal_px, rtol=1e-9)


@pytest.mark.parametrize("focal_is_known", [True, False])
def test_the_turns_spread_as_they_are_said_to(focal_is_known: bool) -> None:
    scene = turning(5)
    rig = known(scene.rig()) if focal_is_known else scene.rig()
    pairs = list(combinations(range(5), 2))
    rotations, sigma = [], []
    for seed in range(24):
        (result,) = align_turns(turns(scene, pairs, 1.0, seed), NOBODY, rig, 1.0, CONFIG)
        # In the frame that suits all images best, as the deviations are.
        between = result.cam_from_world[:, :, :3].transpose(0, 2, 1) @ scene.poses[:, :, :3]
        left, _, right = np.linalg.svd(between.sum(axis=0))
        rotations.append(
            angle_between_rotations(result.cam_from_world[:, :, :3] @ (left @ right), scene.poses[:, :, :3])
        )
        sigma.append(result.rotation_sigma_deg)
    spread = np.degrees(np.sqrt((np.array(rotations) ** 2).mean(axis=0)))
    ratio = spread / np.mean(sigma, axis=0)
    assert (ratio > 0.5).all(), ratio
    assert (ratio < 2.0).all(), ratio
    assert 1e-3 < spread.max() < 0.2


def test_a_pair_of_another_place_is_dropped() -> None:
    scene = turning(6)
    matches = turns(scene, list(combinations(range(6), 2)), noise_px=1.0)
    wrong = matches[3].second_from_first.copy()
    wrong[:, :3] = rotation_from_axis_angle(np.array([0.0, 0.5, 0.0])) @ wrong[:, :3]
    matches[3] = replace(matches[3], second_from_first=wrong, xy_second=matches[3].xy_second[::-1].copy())
    (result,) = align_turns(matches, NOBODY, scene.rig(), 1.0, CONFIG)
    assert result.edges.tolist() == [edge for edge in range(15) if edge != 3]
    assert 1e-4 < misses(result, scene).max() < 0.2


def test_parts_are_apart_and_what_has_depth_is_left_to_its_model() -> None:
    scene = turning(9)
    matches = turns(scene, [(0, 1), (1, 2), (3, 4), (4, 5), (5, 6), (7, 8)])
    matches.append(replace(turns(scene, [(2, 3)])[0], verdict=Verdict.WEAK))
    results = align_turns(matches, np.array([8], np.int32), scene.rig(), 1.0, CONFIG)
    assert [result.images.tolist() for result in results] == [[3, 4, 5, 6], [0, 1, 2]]
    assert [result.edges.tolist() for result in results] == [[2, 3, 4], [0, 1]]
    assert align_turns(matches, NOBODY, scene.rig(), 1.0, replace(CONFIG, min_images=5)) == []
    assert align_turns([], NOBODY, scene.rig(), 1.0, CONFIG) == []
