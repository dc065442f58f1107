"""Epipolar refinement: derivatives, what it repairs, and what it leaves where matches say nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mast3r_sfm.alignment import epipolar
from mast3r_sfm.alignment.epipolar import Cameras, EpipolarProblem, Refinement, refine_poses
from mast3r_sfm.evaluation.pairs import PairErrors, measure_pairs
from mast3r_sfm.geometry.rigid import camera_centre, make_pose, rotation_from_axis_angle
from mast3r_sfm.geometry.similarity import align_similarity
from mast3r_sfm.types import Float64, PairMatches, Rig
from tests.exact import Scene, poses_by_name, ring, street


def noisy_matches(scene: Scene, noise_px: float, seed: int = 0) -> list[PairMatches]:
    rng = np.random.default_rng(seed)
    found = []
    for pair in combinations(range(len(scene.poses)), 2):
        match = scene.matches(*pair)
        moved = {name: getattr(match, name) + noise_px * rng.normal(size=(len(match), 2)) for name in SIDES}
        found.append(replace(match, **moved))
    return found


SIDES = ("xy_first", "xy_second")


def disturbed(scene: Scene, turn_deg: float, shift: float, seed: int = 1) -> Float64:
    """The poses, each turned and shifted at random."""
    rng = np.random.default_rng(seed)
    found = []
    for pose in scene.poses:
        rotation = rotation_from_axis_angle(np.radians(turn_deg) * rng.normal(size=3) / np.sqrt(3)) @ pose[:, :3]
        found.append(make_pose(rotation, -rotation @ (camera_centre(pose) + shift * rng.normal(size=3))))
    return np.stack(found)


def refine(
    scene: Scene, matches: list[PairMatches], *, focal_factor: float = 1.0, rig: Rig | None = None, start: Float64
) -> Refinement:
    rig = rig or scene.rig(focal_factor=focal_factor)
    images = np.arange(len(scene.poses), dtype=np.int32)
    focal = np.array([rig.cameras[number].params[0] for number in rig.camera_of_image])
    return refine_poses(EpipolarProblem.of(matches, images, rig, 1.0), start, focal)


def errors(poses: Float64, scene: Scene) -> PairErrors:
    names = range(len(scene.poses))
    truth = poses_by_name(names, scene.poses)
    return measure_pairs([poses_by_name(names, poses)], truth, sorted(truth))


def test_derivatives() -> None:
    scene = ring(4, turn_deg=80, points=40)
    rig = Rig(cameras=scene.rig().cameras * 2, camera_of_image=np.array([0, 1, 0, 1], np.int32))
    problem = EpipolarProblem.of(noisy_matches(scene, 2.0), np.arange(4, dtype=np.int32), rig, 1.0)
    start = disturbed(scene, 1.0, 0.1)
    cameras = Cameras(rotation=start[:, :, :3], centre=camera_centre(start), log_focal=np.log([650.0, 550.0]))
    loss = epipolar._Loss(problem=problem, start=cameras, kernel=1.0)
    derivatives = loss.sampson(cameras).derivatives()
    matrix, right = loss.normal_equations(cameras)
    assert derivatives.shape == (6, 40, 14)
    scale = np.abs(derivatives).max()
    columns, step = loss._columns(4), 1e-6
    for unknown in range(6 * 4 + 2):
        moved = [cameras.moved(sign * step * np.eye(26)[unknown]) for sign in (1.0, -1.0)]
        numeric = (loss.sampson(moved[0]).error - loss.sampson(moved[1]).error) / (2 * step)
        analytic = np.einsum("ekc,ec->ek", derivatives, (columns == unknown).astype(float))
        np.testing.assert_allclose(analytic, numeric, atol=1e-6 * scale)
        # The gradient of the loss is what the right-hand side says: half of it, with the sign turned.
        slope = (loss.value(moved[0]) - loss.value(moved[1])) / (2 * step)
        assert -2 * right[unknown] == pytest.approx(slope, rel=1e-4, abs=1e-2)
    np.testing.assert_allclose(matrix.toarray(), matrix.toarray().T, rtol=1e-9, atol=1e-6)


def test_exact_matches_give_exact_poses_and_the_focal_length() -> None:
    scene = ring(7, turn_deg=150)
    matches = noisy_matches(scene, 0.0)
    refined = refine(scene, matches, focal_factor=0.8, start=disturbed(scene, 3.0, 0.3))
    assert errors(refined.cam_from_world, scene).error_deg.max() < 0.01
    np.testing.assert_allclose(refined.focal, 600.0, rtol=1e-4)
    assert refined.history[-1] <= refined.history[0]
    assert refined.steps >= len(refined.history) - 1


def test_noise_leaves_little() -> None:
    """Four times better than the start, and not better than noise allows."""
    scene = ring(7, turn_deg=150)
    start = disturbed(scene, 2.0, 0.2)
    refined = refine(scene, noisy_matches(scene, 1.0), focal_factor=1.15, start=start)
    found = errors(refined.cam_from_world, scene)
    assert 0.005 < found.error_deg.mean() < 0.4
    assert errors(start, scene).error_deg.mean() > 1.6
    np.testing.assert_allclose(refined.focal, 600.0, rtol=0.01)
    placed = camera_centre(refined.cam_from_world)
    fit = align_similarity(placed, camera_centre(scene.poses))
    miss = np.linalg.norm(fit.apply(placed) - camera_centre(scene.poses), axis=1)
    assert miss.max() < 0.03


def test_wrong_matches_have_no_say() -> None:
    scene = ring(7, turn_deg=150)
    rng = np.random.default_rng(5)
    matches = []
    for match in noisy_matches(scene, 0.5):
        wrong = rng.random(len(match)) < 0.2
        matches.append(
            replace(match, xy_first=np.where(wrong[:, None], rng.uniform(0, 480, (len(match), 2)), match.xy_first))
        )
    refined = refine(scene, matches, focal_factor=0.9, start=disturbed(scene, 2.0, 0.2))
    assert errors(refined.cam_from_world, scene).error_deg.max() < 0.4
    np.testing.assert_allclose(refined.focal, 600.0, rtol=0.02)


def test_every_camera_has_its_focal_length_and_known_ones_stay() -> None:
    scene = ring(6, turn_deg=150)
    camera = scene.rig().cameras[0]
    cameras = tuple(
        replace(camera, params=np.array([factor * 600.0, *camera.params[1:]]), focal_is_known=known)
        for factor, known in ((1.0, True), (1.2, False), (0.8, False))
    )
    rig = Rig(cameras=cameras, camera_of_image=np.array([0, 1, 2, 0, 1, 2], np.int32))
    refined = refine(scene, noisy_matches(scene, 0.2), rig=rig, start=disturbed(scene, 2.0, 0.2))
    np.testing.assert_allclose(refined.focal[[0, 3]], 600.0, rtol=1e-7)
    np.testing.assert_allclose(refined.focal[[1, 2, 4, 5]], 600.0, rtol=0.01)
    wrong = replace(rig, cameras=(replace(cameras[0], params=np.array([700.0, 320.0, 240.0])), *cameras[1:]))
    held = refine(scene, noisy_matches(scene, 0.2), rig=wrong, start=disturbed(scene, 2.0, 0.2))
    np.testing.assert_allclose(held.focal[[0, 3]], 700.0, rtol=1e-4)


def test_in_a_row_lengths_stay_as_they_were() -> None:
    """Straight forward, epipolar lines say nothing of how far."""
    scene = street(6)
    start = disturbed(scene, 0.5, 0.0)
    stretched = make_pose(start[:, :, :3], -(start[:, :, :3] @ (1.5 * camera_centre(start))[:, :, None])[:, :, 0])
    refined = refine(scene, noisy_matches(scene, 0.3), start=stretched)
    assert errors(refined.cam_from_world, scene).rotation_deg.max() < 0.1
    steps = np.linalg.norm(np.diff(camera_centre(refined.cam_from_world), axis=0), axis=1)
    np.testing.assert_allclose(steps, 1.5 * 0.8, rtol=0.02)


def test_photo_pixels_and_many_matches() -> None:
    """In photos three times as large, with more matches than are used, the result is the same."""
    scene = ring(5, turn_deg=120, points=900)
    start, images = disturbed(scene, 2.0, 0.2), np.arange(5, dtype=np.int32)
    large = [
        replace(match, **{name: 3 * getattr(match, name) for name in SIDES}) for match in noisy_matches(scene, 0.5)
    ]
    problem = EpipolarProblem.of(large, images, scene.rig(photo_scale=3.0), 3.0)
    assert problem.pixels.shape == (10, epipolar.MATCHES_PER_EDGE, 2, 2)
    one = refine_poses(problem, start, np.full(5, 660.0))
    two = refine(scene, noisy_matches(scene, 0.5), focal_factor=1.1, start=start)
    np.testing.assert_allclose(one.cam_from_world, two.cam_from_world, atol=1e-9)
    np.testing.assert_allclose(one.focal, two.focal)


def test_many_edges_share_a_bounded_number_of_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = ring(5, turn_deg=120, points=200)
    monkeypatch.setattr(epipolar, "MAX_MATCHES", 500)
    problem = EpipolarProblem.of(noisy_matches(scene, 0.0), np.arange(5, dtype=np.int32), scene.rig(), 1.0)
    assert problem.weight.shape == (10, 50)
    monkeypatch.setattr(epipolar, "MAX_MATCHES", 10)
    problem = EpipolarProblem.of(noisy_matches(scene, 0.0), np.arange(5, dtype=np.int32), scene.rig(), 1.0)
    assert problem.weight.shape == (10, epipolar.FEW_MATCHES)
