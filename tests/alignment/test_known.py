"""Known poses in the alignment: who contradicts them, and in whose frame the parts end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from mast3r_sfm.alignment.known import judge_pairs, report_contradictions, report_misfit
from mast3r_sfm.alignment.stage import align
from mast3r_sfm.config import AlignConfig
from mast3r_sfm.errors import InputError
from mast3r_sfm.geometry.known_poses import KnownPoses
from mast3r_sfm.geometry.rigid import camera_centre
from mast3r_sfm.types import AlignmentResult, Float64, PairMatches
from tests.exact import Listener, Scene, ring, turned_wrong

CONFIG = AlignConfig()


def known(scene: Scene, images: Sequence[int], *, is_fixed: bool = True, poses: Float64 | None = None) -> KnownPoses:
    mine = scene.poses[list(images)] if poses is None else poses
    params = np.concatenate([Rotation.from_matrix(mine[:, :, :3]).as_quat(), mine[:, :, 3]], axis=1)
    return KnownPoses(images=np.array(images, np.int32), params=params, is_fixed=is_fixed)


def all_matches(scene: Scene, images: Sequence[int] | None = None) -> list[PairMatches]:
    rng = np.random.default_rng(4)
    images = range(len(scene.poses)) if images is None else images
    return [scene.matches(*pair, scale=float(np.exp(rng.normal()))) for pair in combinations(images, 2)]


def assert_true(part: AlignmentResult, scene: Scene, tolerance: float = 1e-4) -> None:
    """The poses are the true ones: same frame, same scale."""
    np.testing.assert_allclose(part.cam_from_world, scene.poses[part.images], atol=tolerance)


@pytest.mark.parametrize("is_fixed", [True, False])
@pytest.mark.parametrize("images", [[0, 1], [1, 4, 6], list(range(7))])
def test_a_part_stands_in_the_frame_of_known_poses(images: list[int], is_fixed: bool) -> None:
    scene = ring(7, turn_deg=120)
    (part,) = align(all_matches(scene), 7, CONFIG, known=known(scene, images, is_fixed=is_fixed))
    assert part.images.tolist() == list(range(7))
    assert len(part.edges) == 21
    assert_true(part, scene)


def test_without_known_poses_the_frame_is_another() -> None:
    scene = ring(7, turn_deg=120)
    (part,) = align(all_matches(scene), 7, CONFIG)
    assert np.abs(camera_centre(part.cam_from_world) - camera_centre(scene.poses)).max() > 0.1


def test_parts_with_known_poses_are_one() -> None:
    """Nothing joins them but their frame."""
    scene = ring(8, turn_deg=360)
    matches = [*all_matches(scene, range(4)), *all_matches(scene, range(4, 8))]
    assert [len(part.images) for part in align(matches, 8, CONFIG)] == [4, 4]
    (part,) = align(matches, 8, CONFIG, known=known(scene, [0, 1, 5, 7]))
    assert part.images.tolist() == list(range(8))
    assert_true(part, scene)
    # With one known pose, the second part has no scale there: that image alone joins.
    first, second = align(matches, 8, CONFIG, known=known(scene, [0, 1, 5]))
    assert first.images.tolist() == [0, 1, 2, 3, 5]
    assert_true(first, scene)
    assert second.images.tolist() == [4, 6, 7]
    assert {(matches[edge].first, matches[edge].second) for edge in second.edges} == {(4, 6), (4, 7), (6, 7)}


def test_one_known_pose_leaves_the_scale() -> None:
    scene = ring(5, turn_deg=90)
    (part,) = align(all_matches(scene), 5, CONFIG, known=known(scene, [2]))
    np.testing.assert_allclose(part.cam_from_world[2], scene.poses[2], atol=1e-6)
    here, there = (
        np.linalg.norm(np.diff(camera_centre(p), axis=0), axis=1) for p in (part.cam_from_world, scene.poses)
    )
    ratio = here / there
    assert np.ptp(ratio) < 1e-4
    assert abs(ratio[0] - 1) > 0.01


def test_fixed_poses_need_no_pair() -> None:
    scene = ring(5, turn_deg=90)
    poses = known(scene, range(5))
    (part,) = align([], 5, CONFIG, known=poses)
    assert part.images.tolist() == list(range(5))
    np.testing.assert_array_equal(part.cam_from_world, poses.cam_from_world)
    assert part.stop_reason == "all poses are known"
    assert align([], 5, CONFIG, known=known(scene, range(5), is_fixed=False)) == []


def test_pairs_that_contradict_two_known_poses_are_not_used() -> None:
    scene, rng = ring(6, turn_deg=120), np.random.default_rng(0)
    matches = all_matches(scene)
    wrong = [2, 7]
    for edge in wrong:
        matches[edge] = turned_wrong(matches[edge], rng)
    poses = known(scene, range(6))
    judged = judge_pairs(matches, poses, CONFIG)
    assert np.flatnonzero(judged.contradicts).tolist() == wrong
    assert judged.known.all()
    assert (judged.rotation_error_deg[wrong] > 20).all()
    assert np.delete(judged.rotation_error_deg, wrong).max() < 1e-5
    (part,) = align(matches, 6, CONFIG, known=poses)
    assert sorted(set(range(15)) - set(part.edges.tolist())) == wrong
    listener = Listener()
    report_contradictions(judged, listener)
    assert listener.notes[0].startswith("2 of 15 verified pairs")
    assert not listener.warnings


def test_a_pair_that_nothing_else_tests_yields_to_known_poses() -> None:
    """By themselves, two photos that are wrong about each other are contradicted by nothing."""
    scene = ring(4, turn_deg=60)
    wrong = turned_wrong(scene.matches(0, 1), np.random.default_rng(1))
    (alone,) = align([wrong], 4, CONFIG)
    assert alone.edges.tolist() == [0]
    (part,) = align([wrong], 4, CONFIG, known=known(scene, [0, 1]))
    assert part.images.tolist() == [0, 1]
    assert part.edges.tolist() == []
    # A prior says so, too; then nothing is left to align.
    assert align([wrong], 4, CONFIG, known=known(scene, [0, 1], is_fixed=False)) == []


def test_poses_that_most_photos_contradict_are_a_warning_and_all_an_error() -> None:
    scene = ring(6, turn_deg=150)
    matches = all_matches(scene)
    poses = scene.poses.copy()
    poses[[2, 3, 4, 5]] = poses[[3, 4, 5, 2]]
    listener = Listener()
    report_contradictions(judge_pairs(matches, known(scene, range(6), poses=poses), CONFIG), listener)
    assert len(listener.warnings) == 1
    assert "14 of 15" in listener.warnings[0]
    # The inverse of all poses: the usual mistake.
    inverse = np.stack([np.linalg.inv(np.vstack([pose, [0, 0, 0, 1]]))[:3] for pose in scene.poses])
    with pytest.raises(InputError, match=r"15 of 15 verified pairs .* from world to camera"):
        report_contradictions(judge_pairs(matches, known(scene, range(6), poses=inverse), CONFIG), listener)


@pytest.mark.parametrize(("baseline", "contradicts"), [(0.02, False), (2.0, True)])
def test_rays_that_are_nearly_parallel_do_not_contradict(baseline: float, contradicts: bool) -> None:
    """The direction of a tiny baseline is not known."""
    scene = ring(2)
    second = scene.poses[0].copy()
    second[:, 3] += [baseline, 0.0, 0.0]
    scene = replace(scene, poses=np.stack([scene.poses[0], second]))
    match = scene.matches(0, 1)
    pose = match.second_from_first.copy()
    pose[:, 3] = Rotation.from_euler("z", 40, degrees=True).as_matrix() @ pose[:, 3]
    judged = judge_pairs([replace(match, second_from_first=pose)], known(scene, [0, 1]), CONFIG)
    assert judged.contradicts.tolist() == [contradicts]


@pytest.mark.parametrize(("off_deg", "warned"), [(0.0, False), (0.02, False), (3.0, True)])
def test_fixed_poses_that_are_too_rough_for_the_matches_are_doubted(off_deg: float, warned: bool) -> None:
    """They contradict no pair, and most of the points would be lost."""
    scene, rng = ring(6, turn_deg=120), np.random.default_rng(2)
    poses = scene.poses.copy()
    turns = Rotation.from_rotvec(np.radians(off_deg / np.sqrt(3)) * rng.normal(size=(6, 3))).as_matrix()
    poses[:, :, :3] = turns @ poses[:, :, :3]
    poses[:, :, 3] = (turns @ poses[:, :, 3:])[:, :, 0]
    matches, rough, listener = all_matches(scene), known(scene, range(6), poses=poses), Listener()
    assert not judge_pairs(matches, rough, CONFIG).contradicts.any()
    report_misfit(matches, rough, scene.rig(), 2.0, listener)
    assert len(listener.warnings) == warned
    if warned:
        assert "15 verified pairs" in listener.warnings[0]
        assert "--poses-prior" in listener.warnings[0]
