"""Alignment by pointmaps from what the match stage hands on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from mast3r_sfm.alignment import stage
from mast3r_sfm.alignment.from_matches import problem_from_matches
from mast3r_sfm.alignment.pointmaps import PointmapAlignment, PointmapOptions, align_pointmaps
from mast3r_sfm.alignment.problem import PointmapProblem
from mast3r_sfm.alignment.stage import Pinholes, align, with_focal_lengths
from mast3r_sfm.alignment.tree import TreeKind
from mast3r_sfm.config import AlignConfig, Config
from mast3r_sfm.errors import ReconstructionError
from mast3r_sfm.geometry.rigid import angle_between_rotations, camera_centre
from mast3r_sfm.geometry.similarity import align_similarity
from mast3r_sfm.reasons import rejected_pairs, why_left_out
from mast3r_sfm.synthetic.render import View
from mast3r_sfm.types import AlignmentResult, Bool, Camera, PairMatches, Rig
from tests.exact import turned_wrong
from tests.pointmaps import oracle_matches
from tests.scenes import HEIGHT_PX, WIDTH_PX, facade_views, image_set, room_views

NOISE = {"pixel_px": 1.0, "depth_relative": 0.01, "log_scale": 0.3, "log_focal": 0.03}
VIEWS = {"facade": facade_views, "room": room_views}


@lru_cache
def _noisy(scene: str) -> tuple[list[PairMatches], Mapping[str, View]]:
    views = VIEWS[scene]()
    return oracle_matches(views, **NOISE), views


def _pinholes(views: Mapping[str, View], *, wrong: float = 1.0, known: bool = False, scale: int = 1) -> Pinholes:
    """One camera for all views, its focal length `wrong` times the truth, for photos `scale` times as large."""
    focal = wrong * next(iter(views.values())).K[0, 0]
    camera = Camera(
        model="SIMPLE_PINHOLE",
        width_px=scale * WIDTH_PX,
        height_px=scale * HEIGHT_PX,
        params=scale * np.array([focal, WIDTH_PX / 2, HEIGHT_PX / 2]),
        focal_is_known=known,
    )
    rig = Rig(cameras=(camera,), camera_of_image=np.zeros(len(views), np.int32))
    return Pinholes(rig=rig, pixel_scale=float(scale))


def _errors(result: AlignmentResult, views: Mapping[str, View]) -> tuple[float, float]:
    """Mean error of relative rotations in degrees, of positions in percent of the longest baseline."""
    truth = np.array([views[name].cam_from_world for name in sorted(views)])
    first, second = np.triu_indices(len(truth), 1)
    relative = [pose[second, :, :3] @ pose[first, :, :3].transpose(0, 2, 1) for pose in (result.cam_from_world, truth)]
    found, centre = camera_centre(result.cam_from_world), camera_centre(truth)
    miss = align_similarity(found, centre, collinear_ok=True).apply(found) - centre
    span = float(np.linalg.norm(centre[:, None] - centre[None], axis=-1).max())
    turn = np.degrees(angle_between_rotations(relative[0], relative[1]))
    return float(turn.mean()), 100 * float(np.linalg.norm(miss, axis=1).mean()) / span


@pytest.mark.parametrize("scene", VIEWS)
def test_pointmaps_align_better_than_averages_and_find_the_focal_length(scene: str) -> None:
    matches, views = _noisy(scene)
    pinholes = _pinholes(views, wrong=1.2)
    (averaged,) = align(matches, len(views), AlignConfig())
    (aligned,) = align(matches, len(views), AlignConfig(), pinholes)
    assert aligned.stop_reason.startswith("pointmaps settled")
    assert len(averaged.focal_px) == 0
    np.testing.assert_array_equal(aligned.images, np.arange(len(views)))
    np.testing.assert_array_equal(aligned.edges, np.arange(len(matches)))
    before, after = _errors(averaged, views), _errors(aligned, views)
    # A pixel of 128 is four times the angle of one of 512, which the bar of 0.3 degrees is meant for.
    assert 0.02 < after[0] < min(0.45, 0.8 * before[0])
    assert 0.02 < after[1] < min(0.5, 0.6 * before[1])
    truth = next(iter(views.values())).K[0, 0]
    assert aligned.focal_px == pytest.approx(np.full(len(views), truth), rel=0.015)
    centres = camera_centre(aligned.cam_from_world)
    baselines = [np.linalg.norm(centres[match.first] - centres[match.second]) for match in matches]
    assert np.mean(baselines) == pytest.approx(1.0)
    assert 0.0 < aligned.residual_deg.max() < 5.0


@pytest.mark.parametrize("scene", VIEWS)
def test_poses_spread_as_they_are_said_to(scene: str) -> None:
    views = VIEWS[scene]()
    truth = np.array([views[name].cam_from_world for name in sorted(views)])
    rotation, position, sigma = [], [], []
    for seed in range(4):
        matches = oracle_matches(views, seed=seed, **NOISE)
        (result,) = align(matches, len(views), AlignConfig(), _pinholes(views))
        # In the frame that suits all images best, as the deviations are.
        left, _, right = np.linalg.svd(
            (result.cam_from_world[:, :, :3].transpose(0, 2, 1) @ truth[:, :, :3]).sum(axis=0)
        )
        found, exact = result.cam_from_world[:, :, :3] @ (left @ right), truth[:, :, :3]
        rotation.append(np.degrees(angle_between_rotations(found, exact)))
        centres, centre = camera_centre(result.cam_from_world), camera_centre(truth)
        fit = align_similarity(centres, centre, collinear_ok=True)
        position.append(np.linalg.norm(fit.apply(centres) - centre, axis=1) / fit.scale)
        sigma.append((result.rotation_sigma_deg, result.position_sigma))
    said = np.sqrt((np.array(sigma) ** 2).mean(axis=(0, 2)))
    for spread, expected in zip((rotation, position), said, strict=True):
        assert 0.5 < float(np.sqrt((np.array(spread) ** 2).mean())) / expected < 2.0


def test_residuals_are_those_of_the_pairs_of_each_image() -> None:
    matches, views = _noisy("room")
    (result,) = align(matches, len(views), AlignConfig(), _pinholes(views))
    pose = result.cam_from_world[:, :, :3]
    missed = np.array(
        [
            np.degrees(angle_between_rotations(one.second_from_first[:, :3], pose[one.second] @ pose[one.first].T))
            for one in matches
        ]
    )
    for image, residual in enumerate(result.residual_deg):
        inside = [image in (matches[edge].first, matches[edge].second) for edge in result.edges]
        assert residual == pytest.approx(np.median(missed[result.edges][inside]), rel=1e-6)
    assert 0.05 < result.residual_deg.max() < 3.0


def test_many_pairs_get_fewer_matches_each(monkeypatch: pytest.MonkeyPatch) -> None:
    matches, views = _noisy("facade")
    images, rig = np.arange(len(views), dtype=np.int32), _pinholes(views).rig
    for total, expected in ((300 * len(matches), 300), (10, 100)):
        monkeypatch.setattr("mast3r_sfm.alignment.from_matches.MAX_TOTAL", total)
        stated = problem_from_matches(matches, images, rig, 1.0)
        assert stated is not None
        assert np.diff(stated[0].start).tolist() == [min(len(match), expected) for match in matches]


def test_what_single_pairs_are_wrong_by_in_depth_costs_little() -> None:
    matches, views = _noisy("facade")
    (before,) = align(matches, len(views), AlignConfig(), _pinholes(views))
    bent = []
    for match in matches:
        # Three per cent, slowly over the image, and another way for each pair and image.
        waves = [
            0.03 * np.sin(match.first + 2 * match.second + xy[:, :1] / 30) for xy in (match.xy_first, match.xy_second)
        ]
        first, second = match.points_first * np.exp(waves[0]), match.points_second * np.exp(-waves[1])
        bent.append(replace(match, points_first=first, points_second=second))
    (after,) = align(bent, len(views), AlignConfig(), _pinholes(views))
    for result in (before, after):
        assert 0.02 < _errors(result, views)[0] < 0.25


def test_a_known_focal_length_stays() -> None:
    matches, views = _noisy("facade")
    pinholes = _pinholes(views, known=True)
    (result,) = align(matches, len(views), AlignConfig(), pinholes)
    np.testing.assert_allclose(result.focal_px, pinholes.rig.cameras[0].params[0], rtol=1e-12)
    rotation, position = _errors(result, views)
    assert 0.02 < rotation < 0.45
    assert 0.02 < position < 0.4


def test_larger_photos_give_the_same_poses() -> None:
    matches, views = _noisy("facade")
    large = [replace(match, xy_first=3 * match.xy_first, xy_second=3 * match.xy_second) for match in matches]
    (one,) = align(matches, len(views), AlignConfig(), _pinholes(views))
    (other,) = align(large, len(views), AlignConfig(), _pinholes(views, scale=3))
    np.testing.assert_allclose(one.cam_from_world, other.cam_from_world, atol=1e-6)
    np.testing.assert_allclose(3 * one.focal_px, other.focal_px, rtol=1e-6)


def test_focal_lengths_do_not_depend_on_how_photos_were_held() -> None:
    matches, views = _noisy("facade")
    images = np.arange(len(views), dtype=np.int32)
    upright = problem_from_matches(matches, images, _pinholes(views).rig, 1.0)
    # The first camera was held on its side: its points turn, and the stored pixels stay.
    quarter = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    turned = [replace(one, points_first=one.points_first @ quarter.T) if one.first == 0 else one for one in matches]
    held = problem_from_matches(turned, images, _pinholes(views).rig, 1.0)
    assert upright is not None
    assert held is not None
    np.testing.assert_allclose(held[0].base_focal_px, upright[0].base_focal_px, rtol=1e-9)
    truth = next(iter(views.values())).K[0, 0]
    np.testing.assert_allclose(upright[0].base_focal_px, truth, rtol=0.06)


def _half(match: PairMatches, inside: Bool) -> PairMatches:
    arrays = ("xy_first", "xy_second", "confidence", "points_first", "points_second")
    return replace(match, **{name: getattr(match, name)[inside] for name in arrays})


def test_pairs_that_share_no_place_do_not_compare() -> None:
    matches, views = _noisy("facade")
    chain = [match for match in matches if (match.first, match.second) in ((0, 1), (1, 2))]
    # Of the second image, one pair sees the left half and the other the right half.
    halves = [chain[0].xy_second[:, 0] < WIDTH_PX / 2 - 8, chain[1].xy_first[:, 0] > WIDTH_PX / 2 + 8]
    apart = [_half(match, half) for match, half in zip(chain, halves, strict=True)]
    assert problem_from_matches(apart, np.arange(3, dtype=np.int32), _pinholes(views).rig, 1.0) is None


def test_a_pair_that_does_not_compare_is_left_in_peace() -> None:
    matches, views = _noisy("facade")
    few = np.arange(len(matches[4])) < 6
    thin = [_half(match, few) if number == 4 else match for number, match in enumerate(matches)]
    stated = problem_from_matches(thin, np.arange(len(views), dtype=np.int32), _pinholes(views).rig, 1.0)
    assert stated is not None
    assert np.flatnonzero(~stated[1]).tolist() == [4]
    assert len(stated[0].pairs) == len(matches) - 1
    (result,) = align(thin, len(views), AlignConfig(), _pinholes(views))
    assert result.stop_reason.startswith("pointmaps settled")
    assert 4 in result.edges
    assert 0.02 < _errors(result, views)[0] < 0.45


def _renumbered(matches: list[PairMatches], by: int) -> list[PairMatches]:
    return [replace(match, first=match.first + by, second=match.second + by) for match in matches]


def test_parts_that_share_no_pair_are_aligned_each_by_itself() -> None:
    (facade, views), (room, others) = _noisy("facade"), _noisy("room")
    rig = _pinholes(views).rig
    number = len(views) + len(others)
    pinholes = Pinholes(rig=replace(rig, camera_of_image=np.zeros(number, np.int32)), pixel_scale=1.0)
    results = align([*facade, *_renumbered(room, len(views))], number, AlignConfig(), pinholes)
    assert [result.images.tolist() for result in results] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert results[0].edges.tolist() == list(range(len(facade)))
    assert results[1].edges.tolist() == list(range(len(facade), len(facade) + len(room)))
    for result, shown in zip(results, (views, others), strict=True):
        assert result.stop_reason.startswith("pointmaps settled")
        rotation, position = _errors(replace(result, images=np.arange(len(shown), dtype=np.int32)), shown)
        assert 0.02 < rotation < 0.45
        assert 0.02 < position < 0.5


def test_a_view_that_only_bad_edges_hold_is_left_out_and_named() -> None:
    matches, views = _noisy("facade")
    last, rng = len(views) - 1, np.random.default_rng(0)
    bad = [turned_wrong(match, rng) if match.second == last else match for match in matches]
    (result,) = align(bad, len(views), AlignConfig(), _pinholes(views))
    assert result.images.tolist() == list(range(last))
    assert result.stop_reason.startswith("pointmaps settled")
    assert result.edges.tolist() == [number for number, match in enumerate(matches) if match.second != last]
    rotation, position = _errors(result, {name: views[name] for name in sorted(views)[:last]})
    assert 0.02 < rotation < 0.45
    assert 0.02 < position < 0.5
    photos = image_set(views)
    said = why_left_out(last, bad, photos, {photos.names[image] for image in result.images})
    assert said == f"its matches with {last} photos of the model contradict the model, or are too few"
    named = rejected_pairs(bad, [result], photos.names)
    assert {pair.second for pair in named} == {photos.names[last]}
    assert len(named) == sum(match.second == last for match in matches)


@pytest.mark.parametrize("problem", ["none", "torn"])
def test_without_a_problem_the_averages_stand(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matches, views = _noisy("facade")

    def torn(*given: object) -> object:
        stated = problem_from_matches(*given)  # type: ignore[arg-type]
        assert stated is not None
        pixels = np.random.default_rng(0).permutation(stated[0].pixels)
        return replace(stated[0], pixels=pixels), stated[1]

    monkeypatch.setattr(stage, "problem_from_matches", torn if problem == "torn" else lambda *_: None)
    (result,) = align(matches, len(views), AlignConfig(), _pinholes(views))
    (averaged,) = align(matches, len(views), AlignConfig())
    np.testing.assert_array_equal(result.cam_from_world, averaged.cam_from_world)
    assert len(result.focal_px) == 0


def test_where_averages_mislead_a_tree_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    matches, views = _noisy("facade")
    asked = []

    def only_from_tree(problem: PointmapProblem, options: PointmapOptions) -> PointmapAlignment:
        asked.append(options.tree)
        if options.tree is None:
            raise ReconstructionError("misled")
        return align_pointmaps(problem, options)

    monkeypatch.setattr(stage, "align_pointmaps", only_from_tree)
    (result,) = align(matches, len(views), AlignConfig(), _pinholes(views))
    assert asked == [None, TreeKind.MAXIMUM]
    assert result.stop_reason.startswith("pointmaps settled")
    assert 0.02 < _errors(result, views)[0] < 0.45


@pytest.mark.parametrize("start", ["maximum", "ward", "average", "single"])
def test_the_start_that_was_asked_for_is_taken_first(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matches, views = _noisy("facade")
    asked = []

    def note(problem: PointmapProblem, options: PointmapOptions) -> PointmapAlignment:
        asked.append(options.tree)
        return align_pointmaps(problem, options)

    monkeypatch.setattr(stage, "align_pointmaps", note)
    config = Config().with_overrides([f"align.start={start}"]).align
    (result,) = align(matches, len(views), config, _pinholes(views))
    assert asked == [TreeKind(start)]
    assert 0.02 < _errors(result, views)[0] < 0.45


def test_cameras_take_the_focal_length_of_the_largest_part_unless_it_is_known() -> None:
    def part(images: list[int], focal: float) -> AlignmentResult:
        count = len(images)
        return AlignmentResult(
            images=np.array(images, np.int32),
            edges=np.arange(1, dtype=np.int32),
            cam_from_world=np.tile(np.eye(3, 4), (count, 1, 1)),
            residual_deg=np.zeros(count),
            history=(1.0,),
            stop_reason="",
            focal_px=np.full(count, focal),
        )

    cameras = tuple(
        Camera(
            model="SIMPLE_PINHOLE",
            width_px=100,
            height_px=80,
            params=np.array([90.0, 50.0, 40.0]),
            focal_is_known=number == 1,
        )
        for number in range(3)
    )
    rig = Rig(cameras=cameras, camera_of_image=np.array([0, 0, 1, 0, 0, 2], np.int32))
    changed = with_focal_lengths(rig, [part([0, 1, 2], 120.0), part([3, 4], 70.0)])
    assert [camera.params.tolist() for camera in changed.cameras] == [[120, 50, 40], [90, 50, 40], [90, 50, 40]]
    assert rig.cameras[0].params[0] == 90
    averaged = replace(part([0, 1], 1.0), focal_px=np.zeros(0))
    assert with_focal_lengths(rig, [averaged]).cameras[0].params[0] == 90
