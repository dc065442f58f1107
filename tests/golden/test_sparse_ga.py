"""The reference's own small problem: eight cameras, 24 pairs, and the errors that its optimiser ended with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.alignment.coarse import CoarseLoss
from mast3r_sfm.alignment.losses import FineLoss, Priors
from mast3r_sfm.alignment.optimise import Stopping, minimise
from mast3r_sfm.alignment.pointmaps import PointmapAlignment, PointmapOptions, align_pointmaps
from mast3r_sfm.alignment.problem import PointmapProblem, Scene
from mast3r_sfm.alignment.start import edge_similarities, tree_start
from mast3r_sfm.alignment.tree import TreeKind
from mast3r_sfm.geometry.rigid import angle_between_rotations, camera_centre
from mast3r_sfm.geometry.similarity import align_similarity
from mast3r_sfm.types import Float64

IMAGES, PAIRS = 8, 24


@dataclass(frozen=True, kw_only=True)
class Errors:
    rotation_deg: Float64
    position_percent: Float64
    relative_deg: Float64
    focal_percent: Float64


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> Mapping[str, Float64]:
    with np.load(golden_dir / "sparse_ga.npz") as file:
        return {name: file[name].astype(np.float64) if file[name].dtype.kind == "f" else file[name] for name in file}


def _problem(
    golden: Mapping[str, Float64], *, shared: bool = False, nonsense: tuple[int, ...] = (), seed: int = 0
) -> PointmapProblem:
    """The stored problem; the matches of nonsense pairs are shuffled."""
    rng = np.random.default_rng(seed)
    cells = [golden[f"in/img{image}/core_depth"].size for image in range(IMAGES)]
    first_anchor = np.concatenate([[0], np.cumsum(cells)])
    pairs, pixels, anchors, offsets, weights = [], [], [], [], []
    for number in range(PAIRS):
        first, begin, end, second, begin_second, end_second = golden[
            f"in/pair{number}/img1_slice1_img2_slice2"
        ].tolist()
        count = end - begin
        sides = [
            (first, np.arange(begin, end)),
            (second, begin_second + (rng.permutation(count) if number in nonsense else np.arange(count))),
        ]
        assert end_second - begin_second == count
        sides.sort(key=lambda side: side[0])
        pairs.append([image for image, _ in sides])
        pixels.append([golden[f"in/img{i}/anchor_pixels_xy"][rows] - golden["in/pp"][i] for i, rows in sides])
        anchors.append([golden[f"in/img{i}/anchor_idx"][rows] + first_anchor[i] for i, rows in sides])
        offsets.append([golden[f"in/img{i}/anchor_offset"][rows] for i, rows in sides])
        weights.append(golden[f"in/pair{number}/conf"])
    weight = np.concatenate(weights)
    cameras = np.zeros(IMAGES, np.int32) if shared else np.arange(IMAGES, dtype=np.int32)
    return PointmapProblem(
        base_focal_px=golden["in/base_focals"],
        camera_of_image=cameras,
        known_focal_px=np.full(1 if shared else IMAGES, np.nan),
        image_of_anchor=np.repeat(np.arange(IMAGES), cells),
        anchor_depth=np.concatenate([golden[f"in/img{image}/core_depth"].ravel() for image in range(IMAGES)]),
        pairs=np.array(pairs, np.int32),
        start=np.concatenate([[0], np.cumsum([len(one) for one in weights])]),
        pixels=np.concatenate([np.stack(one, axis=1) for one in pixels]),
        anchor=np.concatenate([np.stack(one, axis=1) for one in anchors]).astype(np.int64),
        offset=np.concatenate([np.stack(one, axis=1) for one in offsets]),
        weight=weight / weight.mean(),
    )


def _errors(golden: Mapping[str, Float64], cam_from_world: Float64, focal_px: Float64) -> Errors:
    truth = golden["gt/cam2w"]
    rotation, centre = truth[:, :3, :3].transpose(0, 2, 1), truth[:, :3, 3]
    found = camera_centre(cam_from_world)
    fit = align_similarity(found, centre)
    first, second = np.triu_indices(IMAGES, 1)
    own = cam_from_world[:, :, :3]
    relative = [turn[second] @ turn[first].transpose(0, 2, 1) for turn in (own, rotation)]
    span = float(np.linalg.norm(centre[:, None] - centre[None], axis=-1).max())
    return Errors(
        rotation_deg=np.degrees(angle_between_rotations(own @ fit.rotation.T, rotation)),
        position_percent=100 * np.linalg.norm(fit.apply(found) - centre, axis=1) / span,
        relative_deg=np.degrees(angle_between_rotations(relative[0], relative[1])),
        focal_percent=100 * np.abs(focal_px / golden["gt/focals"] - 1),
    )


def _own(golden: Mapping[str, Float64], problem: PointmapProblem, scene: Scene) -> Errors:
    return _errors(golden, scene.cam_from_world, scene.focal_px[problem.camera_of_image])


def _stored(golden: Mapping[str, Float64], variant: str) -> Errors:
    pose = np.linalg.inv(golden[f"result/{variant}/cam2w"])[:, :3]
    return _errors(golden, pose, golden[f"result/{variant}/K"][:, 0, 0])


@pytest.fixture(scope="module")
def clean(golden: Mapping[str, Float64]) -> tuple[PointmapProblem, PointmapAlignment]:
    problem = _problem(golden)
    return problem, align_pointmaps(problem, PointmapOptions())


def test_errors_are_measured_as_the_reference_s_were(golden: Mapping[str, Float64]) -> None:
    errors = _stored(golden, "default")
    np.testing.assert_allclose(errors.rotation_deg, golden["result/default/final_rot_deg_after_sim3"], atol=2e-3)
    stored = golden["result/default/final_trans_pct_of_max_camera_distance"]
    np.testing.assert_allclose(errors.position_percent, stored, atol=2e-3)
    stored = golden["result/default/final_relative_rot_deg"]
    # Stored as arc cosines of float32 numbers, which are off where angles are small.
    np.testing.assert_allclose(np.sort(errors.relative_deg), np.sort(stored), atol=2e-2)


@pytest.mark.parametrize("variant", ["default", "f64", "mst_tree", "short20", "short3"])
def test_errors_are_half_of_the_reference_s(
    golden: Mapping[str, Float64], clean: tuple[PointmapProblem, PointmapAlignment], variant: str
) -> None:
    problem, result = clean
    ours, theirs = _own(golden, problem, result.scene), _stored(golden, variant)
    for name in ("rotation_deg", "position_percent", "relative_deg", "focal_percent"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert 0 < mine.mean() < 0.6 * other.mean(), name
        assert mine.max() < 0.7 * other.max(), name


def test_the_coarse_stage_is_as_good_as_the_reference_s(
    golden: Mapping[str, Float64], clean: tuple[PointmapProblem, PointmapAlignment]
) -> None:
    problem, result = clean
    ours = _own(golden, problem, result.coarse)
    for name, mine in (
        ("rot_deg_after_sim3", ours.rotation_deg),
        ("trans_pct_of_max_camera_distance", ours.position_percent),
        ("relative_rot_deg", ours.relative_deg),
    ):
        # A tenth more is what the data's description allows.
        assert 0.1 < mine.mean() < 1.1 * golden[f"result/default/coarse_{name}"].mean(), name


def test_errors_with_fixed_depths_are_below_the_reference_s(golden: Mapping[str, Float64]) -> None:
    problem = _problem(golden)
    result = align_pointmaps(problem, PointmapOptions(move_depths=False))
    assert not result.scene.log_depth.any()
    ours, theirs = _own(golden, problem, result.scene), _stored(golden, "opt_depth_false")
    for name in ("rotation_deg", "position_percent", "relative_deg", "focal_percent"):
        assert 0.1 < getattr(ours, name).mean() <= getattr(theirs, name).mean(), name


def test_errors_with_one_camera_are_not_above_the_reference_s(golden: Mapping[str, Float64]) -> None:
    # The eight true focal lengths differ by up to 6 %: no shared one is right.
    problem = _problem(golden, shared=True)
    result = align_pointmaps(problem, PointmapOptions())
    assert result.scene.focal_px.shape == (1,)
    ours, theirs = _own(golden, problem, result.scene), _stored(golden, "shared_intrinsics")
    for name in ("rotation_deg", "position_percent", "relative_deg", "focal_percent"):
        assert 0.1 < getattr(ours, name).mean() < 1.01 * getattr(theirs, name).mean(), name


MEASURES = ("rotation_deg", "position_percent", "relative_deg", "focal_percent")


def _without_judgement(problem: PointmapProblem) -> Scene:
    """Settings like the reference's: a tree by the number of matches, losses that level off late, all edges kept."""
    similar = edge_similarities(problem)
    alike = replace(similar, support=np.ones(len(similar.support)))
    scene, _ = tree_start(problem, alike, TreeKind.MAXIMUM)
    scene, _ = minimise(CoarseLoss(problem, 1.0), scene, Stopping())
    scene, _ = minimise(FineLoss(problem, 10.0, Priors()), scene, Stopping())
    return scene


def test_settings_like_the_reference_s_fail_where_a_fifth_is_nonsense(
    golden: Mapping[str, Float64], clean: tuple[PointmapProblem, PointmapAlignment]
) -> None:
    before = _own(golden, clean[0], _without_judgement(clean[0]))
    for name in MEASURES:
        assert getattr(before, name).mean() < 1.3 * getattr(_own(golden, clean[0], clean[1].scene), name).mean(), name
    for seed in range(4):
        nonsense = tuple(np.random.default_rng(seed).choice(PAIRS, round(PAIRS / 5), replace=False).tolist())
        problem = _problem(golden, nonsense=nonsense, seed=seed)
        after = _own(golden, problem, _without_judgement(problem))
        assert after.position_percent.mean() > 2 * before.position_percent.mean()
        assert after.focal_percent.mean() > 2 * before.focal_percent.mean()


def test_a_fifth_of_nonsense_costs_no_more_than_leaving_it_out(
    golden: Mapping[str, Float64], clean: tuple[PointmapProblem, PointmapAlignment]
) -> None:
    before = _own(golden, clean[0], clean[1].scene)
    ratios = []
    for seed in range(4):
        nonsense = tuple(np.random.default_rng(seed).choice(PAIRS, round(PAIRS / 5), replace=False).tolist())
        problem = _problem(golden, nonsense=nonsense, seed=seed)
        result = align_pointmaps(problem, PointmapOptions())
        assert sorted(np.flatnonzero(~result.kept)) == sorted(nonsense)
        assert result.placed.all()
        without = align_pointmaps(problem.with_edges(result.kept), PointmapOptions())
        noisy, best = _own(golden, problem, result.scene), _own(golden, problem, without.scene)
        for name in MEASURES:
            assert getattr(noisy, name).mean() < 1.02 * getattr(best, name).mean(), name
        ratios.append([getattr(noisy, name).mean() / getattr(before, name).mean() for name in MEASURES])
    assert (np.mean(ratios, axis=0) < 1.5).all()
    assert (np.mean(ratios, axis=0) > 0.9).all()
