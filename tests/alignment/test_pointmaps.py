"""Alignment of pointmaps on rendered scenes, whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from mast3r_sfm.alignment.coarse import CoarseLoss
from mast3r_sfm.alignment.losses import FineLoss, Priors
from mast3r_sfm.alignment.optimise import Stopping, minimise
from mast3r_sfm.alignment.pointmaps import PointmapOptions, align_pointmaps
from mast3r_sfm.alignment.problem import PointmapProblem
from mast3r_sfm.alignment.start import average_start, edge_similarities, tree_start
from mast3r_sfm.alignment.tree import TreeKind, kinematic_trees, saturating_score
from mast3r_sfm.errors import DivergedError, ReconstructionError
from mast3r_sfm.geometry.rigid import (
    angle_between_rotations,
    camera_centre,
    compose_poses,
    invert_pose,
    rotation_from_axis_angle,
)
from mast3r_sfm.synthetic.oracle import OracleModel, OracleNoise
from mast3r_sfm.synthetic.render import View
from tests.pointmaps import measure, oracle_problem, with_known_focal
from tests.scenes import facade_views, room_views, rotation_views, second_from_first

NOISE = {"pixel_px": 1.0, "depth_relative": 0.01, "log_scale": 0.3}
VIEWS = {"facade": facade_views, "room": room_views}


@lru_cache
def _noisy(scene: str) -> tuple[PointmapProblem, Mapping[str, View]]:
    views = VIEWS[scene]()
    return oracle_problem(views, **NOISE), views


@pytest.mark.parametrize("scene", VIEWS)
def test_unknown_focal_lengths_and_scales_are_found(scene: str) -> None:
    problem, views = _noisy(scene)
    result = align_pointmaps(problem, PointmapOptions())
    errors = measure(result.scene, problem, views)
    assert result.kept.all()
    assert result.placed.all()
    assert 0.01 < errors.rotation_deg < 0.3
    assert 0.005 < errors.position_percent < 0.5
    assert 0.01 < errors.focal_percent < 1.0
    assert ((result.residual_px > 0.3) & (result.residual_px < 2.0)).all()
    assert result.good_edges.sum() == 2 * len(problem.pairs)


@pytest.mark.parametrize("scene", VIEWS)
def test_known_focal_lengths_stay_and_make_it_better(scene: str) -> None:
    problem, views = _noisy(scene)
    problem = with_known_focal(problem, views)
    result = align_pointmaps(problem, PointmapOptions())
    errors = measure(result.scene, problem, views)
    # The pixels are those of a network of 128 px: a quarter of the number that the bar of 0.15 degrees is meant for.
    assert 0.01 < errors.rotation_deg < 0.2
    assert 0.005 < errors.position_percent < 0.3
    np.testing.assert_array_equal(result.scene.focal_px, problem.known_focal_px)


@pytest.mark.parametrize("kind", [TreeKind.MAXIMUM, TreeKind.WARD])
@pytest.mark.parametrize("scene", VIEWS)
def test_a_tree_leads_to_the_same_place(scene: str, kind: TreeKind) -> None:
    problem, views = _noisy(scene)
    similar = edge_similarities(problem)
    starts = tree_start(problem, similar, kind)[0], average_start(problem, similar)[0]
    start = [measure(one, problem, views) for one in starts]
    assert start[1].rotation_deg < start[0].rotation_deg < 3.0
    assert start[1].position_percent < start[0].position_percent < 10.0
    scenes = [align_pointmaps(problem, PointmapOptions(tree=tree)).scene for tree in (kind, None)]
    ends = [measure(scene, problem, views) for scene in scenes]
    assert ends[0].rotation_deg == pytest.approx(ends[1].rotation_deg, abs=0.02)
    assert ends[0].position_percent == pytest.approx(ends[1].position_percent, abs=0.05)


def test_a_clustering_that_joins_no_pair_gives_way_to_the_maximum_tree() -> None:
    problem, _ = _noisy("facade")
    # A path: clusters are joined by the images that stand for them, which need not be its neighbours.
    path = problem.with_edges(problem.pairs[:, 1] - problem.pairs[:, 0] == 1)
    similar = edge_similarities(path)
    similar = replace(similar, support=np.ones(len(path.pairs)))
    cells = len(path.anchor_depth) / path.num_images
    evidence = np.diff(path.start).astype(np.float64)
    (ward,) = kinematic_trees(path.pairs, evidence, path.num_images, TreeKind.WARD, saturating_score(cells))
    assert any(abs(parent - child) > 1 for parent, child in ward.edges.tolist())
    scene, agrees = tree_start(path, similar, TreeKind.WARD)
    other, _ = tree_start(path, similar, TreeKind.MAXIMUM)
    assert agrees.all()
    np.testing.assert_array_equal(scene.cam_from_world, other.cam_from_world)


def test_without_noise_the_result_is_exact_but_for_whole_pixels() -> None:
    views = facade_views()
    problem = oracle_problem(views)
    errors = measure(align_pointmaps(problem, PointmapOptions()).scene, problem, views)
    assert errors.rotation_deg < 0.1
    assert errors.position_percent < 0.2


def test_a_turning_camera_keeps_its_place() -> None:
    views = rotation_views()
    problem = with_known_focal(oracle_problem(views, **NOISE), views)
    result = align_pointmaps(problem, PointmapOptions())
    truth = np.array([views[name].cam_from_world for name in sorted(views)])
    scene = result.scene
    first, second = np.triu_indices(len(truth), 1)
    relative = [pose[second, :, :3] @ pose[first, :, :3].transpose(0, 2, 1) for pose in (scene.cam_from_world, truth)]
    chord = np.linalg.norm(relative[0] - relative[1], axis=(1, 2)) / np.sqrt(2)
    assert 0.005 < np.degrees(chord.mean()) < 0.2
    centres = camera_centre(scene.cam_from_world)
    depth = np.median(problem.anchor_depth) * np.exp(np.median(scene.log_scale))
    assert np.linalg.norm(centres - centres.mean(axis=0), axis=1).max() < 0.02 * depth


def test_pairs_taken_for_another_place_are_dropped_and_cost_nothing() -> None:
    views, noise = facade_views(), {**NOISE, "outlier_pairs": 0.25}
    names, seed = sorted(views), 2
    problem = oracle_problem(views, seed=seed, by_descriptors=True, **noise)
    model = OracleModel(views, OracleNoise(**noise), seed)
    wrong = np.array([model.is_outlier(names[first], names[second]) for first, second in problem.pairs])
    assert 2 <= wrong.sum() <= 5
    result = align_pointmaps(problem, PointmapOptions())
    np.testing.assert_array_equal(result.kept, ~wrong)
    without = align_pointmaps(problem.with_edges(~wrong), PointmapOptions())
    assert measure(result.scene, problem, views).rotation_deg < 0.3
    for name, value in vars(measure(result.scene, problem, views)).items():
        assert value < 1.1 * getattr(measure(without.scene, problem, views), name), name


def test_an_image_that_only_nonsense_holds_is_left_out() -> None:
    problem, views = _noisy("facade")
    rng = np.random.default_rng(0)
    pixels, anchor = problem.pixels.copy(), problem.anchor.copy()
    last = len(views) - 1
    inside = (problem.pairs[problem.edge_of_match] == last).any(axis=1)
    shuffled = rng.permutation(np.flatnonzero(inside))
    pixels[inside, 1], anchor[inside, 1] = pixels[shuffled, 1], anchor[shuffled, 1]
    result = align_pointmaps(replace(problem, pixels=pixels, anchor=anchor), PointmapOptions())
    assert result.placed.tolist() == [True] * last + [False]
    assert result.good_edges[last] == 0
    assert result.residual_px[last] == 0
    np.testing.assert_array_equal(result.kept, ~(problem.pairs == last).any(axis=1))


@pytest.mark.parametrize("left", [0, 1, 5])
def test_an_edge_that_says_next_to_nothing_changes_next_to_nothing(left: int) -> None:
    problem, views = _noisy("facade")
    edge = problem.edge_of_match
    if left:
        few = (edge != 2) | (np.arange(len(edge)) < problem.start[2] + left)
        counts = np.bincount(edge[few])
        thin = replace(
            problem,
            start=np.concatenate([[0], np.cumsum(counts)]),
            **{name: getattr(problem, name)[few] for name in ("pixels", "anchor", "offset", "weight")},
        )
    else:
        thin = replace(problem, weight=np.where(edge == 2, 0.0, problem.weight))
    result = align_pointmaps(thin, PointmapOptions())
    # Its few matches start nothing, but agree with the rest.
    assert np.flatnonzero(~result.kept).tolist() == ([] if left else [2])
    assert 0.01 < measure(result.scene, problem, views).rotation_deg < 0.3


def test_two_images_are_enough() -> None:
    problem, views = _noisy("facade")
    names, cells = sorted(views)[:2], len(problem.anchor_depth) // len(views)
    two = replace(
        problem.with_edges(np.arange(len(problem.pairs)) == 0),
        base_focal_px=problem.base_focal_px[:2],
        camera_of_image=np.arange(2, dtype=np.int32),
        known_focal_px=np.full(2, np.nan),
        image_of_anchor=problem.image_of_anchor[: 2 * cells],
        anchor_depth=problem.anchor_depth[: 2 * cells],
    )
    result = align_pointmaps(two, PointmapOptions())
    assert result.placed.all()
    first, second = (result.scene.cam_from_world[image] for image in range(2))
    truth = second_from_first(views[names[0]], views[names[1]])
    found = compose_poses(second, invert_pose(first))
    assert 0.01 < np.degrees(angle_between_rotations(found[:, :3], truth[:, :3])) < 0.5
    baselines = [pose[:, 3] / np.linalg.norm(pose[:, 3]) for pose in (found, truth)]
    assert np.linalg.norm(baselines[0] - baselines[1]) < 0.05


def test_parts_that_share_no_pair_are_refused() -> None:
    problem, _ = _noisy("facade")
    apart = (problem.pairs < 3).all(axis=1) | (problem.pairs >= 3).all(axis=1)
    with pytest.raises(ReconstructionError, match="do not connect all images"):
        align_pointmaps(problem.with_edges(apart), PointmapOptions())


def test_the_same_problem_gives_the_same_bits() -> None:
    problem, _ = _noisy("facade")
    first, second = (align_pointmaps(problem, PointmapOptions()).scene for _ in range(2))
    np.testing.assert_array_equal(first.cam_from_world, second.cam_from_world)
    np.testing.assert_array_equal(first.log_depth, second.log_depth)


def test_the_loss_falls_in_every_step_and_the_root_stays() -> None:
    problem, _ = _noisy("room")
    start, _ = average_start(problem, edge_similarities(problem))
    turn = rotation_from_axis_angle(np.random.default_rng(0).normal(0, 0.03, (problem.num_images, 3)))
    start = replace(start, cam_from_world=turn @ start.cam_from_world)
    scene, course = minimise(FineLoss(problem, 4.0, Priors()), start, Stopping())
    assert course.converged
    assert 3 <= len(course.history) <= 30
    assert (np.diff(course.history) < 0).all()
    assert course.history[-1] < 0.7 * course.history[0]
    still = (scene.cam_from_world == start.cam_from_world).all(axis=(1, 2)) & (scene.log_scale == start.log_scale)
    assert still.sum() == 1


@pytest.mark.parametrize("loss", [CoarseLoss, FineLoss])
def test_nan_names_the_step_and_the_worst_edge(loss: type[CoarseLoss] | type[FineLoss]) -> None:
    problem, _ = _noisy("facade")
    start, _ = average_start(problem, edge_similarities(problem))
    pixels = problem.pixels.copy()
    pixels[problem.start[4]] = np.nan
    broken = replace(problem, pixels=pixels)
    made = CoarseLoss(broken, 0.05) if loss is CoarseLoss else FineLoss(broken, 1.0, Priors())
    first, second = problem.pairs[4]
    with pytest.raises(DivergedError, match=f"at step 0; the worst edges are {first}–{second}, "):
        minimise(made, start, Stopping())
