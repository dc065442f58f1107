"""The linearisation of both losses, and the elimination of depths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mast3r_sfm.alignment import losses
from mast3r_sfm.alignment.canonical import GRID_PX
from mast3r_sfm.alignment.coarse import CoarseLoss
from mast3r_sfm.alignment.elimination import SharedAnchors, find_shared
from mast3r_sfm.alignment.losses import FineLoss, Priors, move
from mast3r_sfm.alignment.normal import PER_IMAGE
from mast3r_sfm.alignment.problem import PointmapProblem, Scene, camera_points, make_batches
from mast3r_sfm.errors import ShapeError
from mast3r_sfm.geometry.rigid import make_pose, rotation_from_axis_angle
from mast3r_sfm.types import Bool, Float64

IMAGES, CELLS, MATCHES = 4, 6, 9


def _problem(shared: bool = True) -> PointmapProblem:
    """Random numbers: the losses need no scene to be smooth."""
    rng = np.random.default_rng(0)
    pairs = np.array([[0, 1], [0, 2], [1, 2], [2, 3], [1, 3]], np.int32)
    counts = np.array([MATCHES, 3, MATCHES, 1, 5])
    total = int(counts.sum())
    image = np.repeat(pairs, counts, axis=0)
    return PointmapProblem(
        base_focal_px=rng.uniform(90, 110, IMAGES),
        camera_of_image=np.array([0, 1, 0, 2] if shared else range(IMAGES), np.int32),
        known_focal_px=np.array([np.nan, np.nan, 100.0] if shared else [np.nan] * IMAGES),
        image_of_anchor=np.repeat(np.arange(IMAGES), CELLS),
        anchor_depth=rng.uniform(4, 6, IMAGES * CELLS),
        pairs=pairs,
        start=np.concatenate([[0], np.cumsum(counts)]),
        pixels=rng.uniform(-40, 40, (total, 2, 2)),
        anchor=image * CELLS + rng.integers(0, CELLS, (total, 2)),
        offset=rng.uniform(0.9, 1.1, (total, 2)),
        weight=rng.uniform(0.5, 2, total),
    )


def _scene(problem: PointmapProblem) -> Scene:
    rng = np.random.default_rng(1)
    rotation = rotation_from_axis_angle(rng.normal(0, 0.1, (IMAGES, 3)))
    return Scene(
        cam_from_world=make_pose(rotation, rng.normal(0, 0.3, (IMAGES, 3))),
        log_scale=rng.normal(0, 0.1, IMAGES),
        log_depth=rng.normal(0, 0.03, IMAGES * CELLS),
        focal_px=rng.uniform(90, 110, problem.num_cameras),
    )


def _losses(problem: PointmapProblem) -> list[CoarseLoss | FineLoss]:
    return [CoarseLoss(problem, 0.3), FineLoss(problem, 20.0, Priors())]


def _nothing_fixed(problem: PointmapProblem) -> np.ndarray:
    return np.zeros(PER_IMAGE * IMAGES + problem.num_cameras, bool)


def _total_weight(loss: CoarseLoss | FineLoss) -> float:
    return float(loss.problem.weight.sum()) * (1 if isinstance(loss, CoarseLoss) else 2)


@pytest.mark.parametrize("allowing", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_the_fine_gradient_is_the_slope_of_the_loss(shared: bool, allowing: bool) -> None:
    problem = replace(_problem(shared), place_error_px=1.0)
    scene = _scene(problem)
    loss = FineLoss(problem, 20.0, Priors(), near=scene if allowing else None)
    assert (loss.value(scene) < FineLoss(problem, 20.0, Priors()).value(scene)) == allowing
    np.testing.assert_array_equal(loss.residuals(scene), FineLoss(problem, 20.0, Priors()).residuals(scene))
    equations = loss.linearise(scene, _nothing_fixed(problem))
    still, unmoved = np.zeros(len(equations.gradient)), np.zeros(len(scene.log_depth))
    for unknown in range(len(equations.gradient)):
        step = still.copy()
        step[unknown] = 1e-6
        rise = [loss.value(move(problem, scene, sign * step, unmoved)) for sign in (1, -1)]
        slope = (rise[0] - rise[1]) / 2e-6 * _total_weight(loss)
        assert equations.gradient[unknown] == pytest.approx(slope, rel=1e-5, abs=1e-4)
    depths = equations.depths
    assert depths is not None
    for anchor, gradient in zip(depths.anchors, depths.gradient * depths.root, strict=True):
        step = unmoved.copy()
        step[anchor] = 1e-6
        rise = [loss.value(move(problem, scene, still, sign * step)) for sign in (1, -1)]
        slope = (rise[0] - rise[1]) / 2e-6 * _total_weight(loss)
        assert gradient == pytest.approx(slope, rel=1e-5, abs=1e-4)


def test_the_coarse_gradient_is_the_slope_where_depth_stays() -> None:
    problem = _problem()
    loss, scene = _losses(problem)[0], _scene(problem)
    equations = loss.linearise(scene, _nothing_fixed(problem))
    assert not equations.free[PER_IMAGE * IMAGES :].any()
    # The depth that residuals are divided by is held during a step, and only scales change it.
    for unknown in np.flatnonzero(np.arange(PER_IMAGE * IMAGES) % PER_IMAGE < 6):
        step = np.zeros(len(equations.gradient))
        step[unknown] = 1e-6
        unmoved = np.zeros(len(scene.log_depth))
        rise = [loss.value(move(problem, scene, sign * step, unmoved)) for sign in (1, -1)]
        slope = (rise[0] - rise[1]) / 2e-6 * _total_weight(loss)
        assert equations.gradient[unknown] == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_moments_give_the_equations_of_single_matches() -> None:
    problem, scene = _problem(), _scene(_problem())
    loss, kernel = _losses(problem)[0], 0.3
    unmoved, unknowns = np.zeros(len(scene.log_depth)), PER_IMAGE * IMAGES + problem.num_cameras

    def world(at: Scene) -> Float64:
        """[M, 3] differences, and [M] depths."""
        points = [
            camera_points(problem, at, np.arange(len(problem.weight))[:, None], images, side)[:, 0]
            for side, images in enumerate(problem.pairs[problem.edge_of_match].T)
        ]
        poses = [at.cam_from_world[images] for images in problem.pairs[problem.edge_of_match].T]
        placed = [
            np.einsum("mji,mj->mi", pose[:, :, :3], local - pose[:, :, 3])
            for pose, local in zip(poses, points, strict=True)
        ]
        return np.column_stack([placed[0] - placed[1], 0.5 * (points[0][:, 2] + points[1][:, 2])])

    here = world(scene)
    jacobian = np.zeros((len(here), 3, unknowns))
    for unknown in range(PER_IMAGE * IMAGES):
        step = np.zeros(unknowns)
        step[unknown] = 1e-6
        ends = [world(move(problem, scene, sign * step, unmoved))[:, :3] for sign in (1, -1)]
        jacobian[:, :, unknown] = (ends[0] - ends[1]) / 2e-6 / here[:, 3:]
    error = here[:, :3] / here[:, 3:]
    weight = problem.weight / (1 + (error**2).sum(axis=1) / kernel**2)
    equations = loss.linearise(scene, _nothing_fixed(problem))
    expected = np.einsum("m,mrp,mrq->pq", weight, jacobian, jacobian)
    assert isinstance(equations.matrix, np.ndarray)
    np.testing.assert_allclose(equations.matrix, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        equations.gradient, np.einsum("m,mrp,mr->p", weight, jacobian, error), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(loss.residuals(scene), np.linalg.norm(error, axis=1), rtol=1e-9)


def test_points_are_placed_anew_where_depths_or_focal_lengths_changed() -> None:
    problem, scene = _problem(), _scene(_problem())
    loss = _losses(problem)[0]
    loss.value(scene)
    for other in (replace(scene, log_depth=scene.log_depth + 0.1), replace(scene, focal_px=1.1 * scene.focal_px)):
        assert loss.value(other) == CoarseLoss(problem, 0.3).value(other) != loss.value(scene)


def test_the_coarse_loss_does_not_fall_when_the_world_shrinks() -> None:
    problem, scene = _problem(), _scene(_problem())
    loss = _losses(problem)[0]
    pose = scene.cam_from_world.copy()
    pose[:, :, 3] *= 0.01
    smaller = replace(scene, cam_from_world=pose, log_scale=scene.log_scale + np.log(0.01))
    assert loss.value(smaller) == pytest.approx(loss.value(scene), rel=1e-9)


def test_losses_do_not_change_when_the_world_is_turned_and_moved() -> None:
    problem, scene = _problem(), _scene(_problem())
    turn = rotation_from_axis_angle(np.array([0.3, -1.0, 0.5]))
    rotation = scene.cam_from_world[:, :, :3] @ turn
    shift = scene.cam_from_world[:, :, 3] - rotation @ np.array([1.0, -2.0, 3.0])
    elsewhere = replace(scene, cam_from_world=make_pose(rotation, shift))
    for loss in _losses(problem):
        assert loss.value(elsewhere) == pytest.approx(loss.value(scene), rel=1e-9)


def _errors(problem: PointmapProblem, scene: Scene) -> Float64:
    """[M, 2, 2] by match and side, match by match."""
    error = np.zeros((len(problem.weight), 2, 2))
    for match, edge in enumerate(problem.edge_of_match):
        for side in (0, 1):
            source, target = problem.pairs[edge, [side, 1 - side]]
            point = camera_points(problem, scene, np.array([[match]]), np.array([source]), side)[0, 0]
            pose, other = scene.cam_from_world[source], scene.cam_from_world[target]
            seen = other[:, :3] @ pose[:, :3].T @ (point - pose[:, 3]) + other[:, 3]
            focal = scene.focal_px[problem.camera_of_image[target]]
            error[match, side] = focal * seen[:2] / seen[2] - problem.pixels[match, 1 - side]
    return error


def _unsure(problem: PointmapProblem, scene: Scene) -> Float64:
    """[M, 2, 2] what `FineLoss` finds near a scene, match by match, by numeric derivatives."""
    found = np.zeros((len(problem.weight), 2, 2))
    for match, side in np.ndindex(found.shape[:2]):
        anchor = problem.anchor[match, side]
        offsets = np.log(problem.offset[problem.anchor == anchor])
        steep = offsets.std(ddof=1) / (GRID_PX / np.sqrt(12)) if len(offsets) > 1 else 0.0
        step = 1e-6 * (np.arange(len(scene.log_depth)) == anchor)
        ends = [_errors(problem, replace(scene, log_depth=scene.log_depth + sign * step)) for sign in (1, -1)]
        moved = (ends[0] - ends[1])[match, side] / 2e-6
        length = np.linalg.norm(moved)
        far = problem.place_error_px * steep * length
        found[match, side] = moved / length * np.sqrt(1 - 1 / np.sqrt(1 + far**2))
    return found


def _whole(
    problem: PointmapProblem, scene: Scene, free: Bool, damping: float, unsure: Float64
) -> tuple[Float64, Float64]:
    """The step by a matrix over all unknowns and depths, whose derivatives are numeric."""
    unknowns, anchors, priors = len(free), len(scene.log_depth), Priors()

    def errors(step: Float64) -> Float64:
        error = _errors(problem, move(problem, scene, step[:unknowns], step[unknowns:]))
        return np.asarray(error - unsure * (unsure * error).sum(axis=-1, keepdims=True))

    steps = 1e-6 * np.eye(unknowns + anchors)
    jacobian = np.stack([(errors(step) - errors(-step)) / 2e-6 for step in steps], axis=-1)
    error = errors(np.zeros(unknowns + anchors))
    weight = problem.weight[:, None] / (1 + (error**2).sum(axis=-1) / 20.0**2)
    matrix = np.einsum("ms,mscp,mscq->pq", weight, jacobian, jacobian)
    gradient = np.einsum("ms,mscp,msc->p", weight, jacobian, error)
    matrix[np.arange(unknowns, len(matrix)), np.arange(unknowns, len(matrix))] += 1 / priors.log_depth**2
    gradient[unknowns:] += scene.log_depth / priors.log_depth**2
    for image, camera in enumerate(PER_IMAGE * IMAGES + problem.camera_of_image):
        matrix[camera, camera] += 1 / priors.log_focal**2
        change = np.log(scene.focal_px[problem.camera_of_image[image]] / problem.base_focal_px[image])
        gradient[camera] += change / priors.log_focal**2
    matrix[np.diag_indices(len(matrix))] *= 1 + damping
    seen = np.isin(np.arange(anchors), problem.anchor)
    kept = np.flatnonzero(np.concatenate([free, seen]))
    solution = np.zeros(len(matrix))
    solution[kept] = np.linalg.solve(matrix[np.ix_(kept, kept)], -gradient[kept])
    return solution[:unknowns], solution[unknowns:]


@pytest.mark.parametrize("sharing", ["some", "one", "none"])
@pytest.mark.parametrize("group", [1, 1000])
@pytest.mark.parametrize("dense", [0, 1000])
def test_eliminating_depths_gives_the_step_of_the_whole(
    dense: int, group: int, sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where anchors are seen by some edges, where all see one of each image, and where no two matches see one."""
    monkeypatch.setattr("mast3r_sfm.alignment.normal.DENSE", dense)
    monkeypatch.setattr("mast3r_sfm.alignment.losses.GROUP_MATCHES", group)
    problem = _problem()
    image = problem.pairs[problem.edge_of_match].astype(np.int64)
    if sharing == "one":
        problem = replace(problem, anchor=image * CELLS)
    elif sharing == "none":
        number = image.size
        depth = np.random.default_rng(2).uniform(4, 6, number)
        anchor = np.arange(number).reshape(image.shape)
        problem = replace(problem, anchor=anchor, anchor_depth=depth, image_of_anchor=image.ravel())
    scene = _scene(problem)
    log_depth = np.random.default_rng(3).normal(0, 0.03, len(problem.anchor_depth))
    scene = replace(scene, log_depth=log_depth)
    fixed = _nothing_fixed(problem)
    fixed[:PER_IMAGE] = True
    equations = FineLoss(problem, 20.0, Priors()).linearise(scene, fixed)
    assert isinstance(equations.matrix, np.ndarray) == bool(dense)
    step, change = equations.solve(0.01)
    expected, expected_change = _whole(problem, scene, equations.free, 0.01, np.zeros((len(problem.weight), 2, 2)))
    np.testing.assert_allclose(step, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(change, expected_change, rtol=1e-5, atol=1e-7)
    assert not step[:PER_IMAGE].any()
    assert step[-1] == 0, "a known focal length moved"
    assert np.abs(step[PER_IMAGE:-1]).max() > 1e-4


def test_the_step_of_the_whole_where_depths_may_be_wrong() -> None:
    problem = replace(_problem(), place_error_px=3.0)
    scene, fixed = _scene(problem), _nothing_fixed(problem)
    fixed[:PER_IMAGE] = True
    unsure = _unsure(problem, scene)
    assert np.linalg.norm(unsure, axis=-1).max() > 0.5
    equations = FineLoss(problem, 20.0, Priors(), near=scene).linearise(scene, fixed)
    step, change = equations.solve(0.01)
    expected, expected_change = _whole(problem, scene, equations.free, 0.01, unsure)
    np.testing.assert_allclose(step, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(change, expected_change, rtol=1e-5, atol=1e-7)
    without, _ = FineLoss(problem, 20.0, Priors()).linearise(scene, fixed).solve(0.01)
    assert np.abs(without - step).max() > 1e-4


def test_pairs_that_are_not_kept_are_sought_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem()
    scene, fixed = _scene(problem), _nothing_fixed(problem)
    fixed[:PER_IMAGE] = True
    kept, anew = (FineLoss(problem, 20.0, Priors()) for _ in range(2))
    step, change = kept.linearise(scene, fixed).solve(0.01)
    monkeypatch.setattr(losses, "KEPT_PAIRS", 0)
    sought = 0

    def counted(*given: Any) -> SharedAnchors:
        nonlocal sought
        sought += 1
        return find_shared(*given)

    monkeypatch.setattr(losses, "find_shared", counted)
    for steps in (1, 2):
        found, found_change = anew.linearise(scene, fixed).solve(0.01)
        assert sought == steps
        np.testing.assert_array_equal(found, step)
        np.testing.assert_array_equal(found_change, change)
    kept.linearise(scene, fixed)
    assert sought == 2


def test_pairs_of_matches_that_see_one_anchor_are_all_found_once() -> None:
    rng = np.random.default_rng(0)
    anchors, used = rng.integers(0, 9, 200), rng.random(200) < 0.8
    edges = np.sort(rng.integers(0, 5, 200))
    shared = find_shared(anchors, edges, used)
    of_piece = np.repeat(np.arange(len(shared.first)), np.diff([*shared.first, len(shared.left)]))
    found = []
    for left, right, (one, other) in zip(shared.left, shared.right, shared.edges[of_piece], strict=True):
        real = left < len(anchors)
        np.testing.assert_array_equal(real, right < len(anchors))
        assert (edges[left[real]] == one).all()
        assert (edges[right[real]] == other).all()
        found += [(min(pair), max(pair)) for pair in zip(left[real].tolist(), right[real].tolist(), strict=True)]
    expected = [
        (i, j) for i in range(200) for j in range(i + 1, 200) if used[i] and used[j] and anchors[i] == anchors[j]
    ]
    assert sorted(found) == expected


def test_batches_hold_every_match_once() -> None:
    start = np.concatenate([[0], np.cumsum([5, 1, 700, 90000, 3, 3, 260, 261])])
    counted = np.zeros(start[-1])
    for batch in make_batches(start):
        np.add.at(counted, batch.rows.ravel(), batch.used.ravel())
        assert batch.used.mean() >= 0.5
        assert len(batch.edges) == 1 or batch.rows.size <= 1 << 16
    np.testing.assert_array_equal(counted, 1)


def test_contradictory_problems_are_refused() -> None:
    problem = _problem()
    for change, message in (
        ({"pairs": problem.pairs[:, ::-1]}, "first < second"),
        ({"anchor_depth": -problem.anchor_depth}, "positive"),
        ({"start": problem.start[:-1]}, r"pairs has shape \(5, 2\), expected \(4, 2\)"),
        ({"start": np.array([0, 9, 9, 21, 22, 27])}, "one per edge"),
    ):
        with pytest.raises(ShapeError, match=message):
            replace(problem, **change)
