"""The points of a pointmap model's two decodes, and whether both tell the same story."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.rigid import rotation_from_axis_angle, transform_points
from mast3r_sfm.matching.check import check_pair
from mast3r_sfm.matching.decodes import CONTRADICTION_DEG, MIN_MATCHES, DecodedPoints
from mast3r_sfm.matching.putative import match_dense
from mast3r_sfm.synthetic.render import View
from mast3r_sfm.types import Encoding, Float64, PairPrediction, Verdict, ViewPrediction
from tests.exact import ring, wall
from tests.scenes import load, object_views, oracle, plane_views, room_views

CONFIG = MatchConfig()


def decoded(points: Float64, pose: Float64, *, scale: float = 1.0) -> DecodedPoints:
    """What exact decodes give of points in the first camera's frame; the backward one in a scale of its own."""
    second = transform_points(pose, points)
    return DecodedPoints(points, points, scale * second, scale * second)


def some_points(seed: int = 0, number: int = 100) -> Float64:
    return np.random.default_rng(seed).uniform([-1, -1, 3], [1, 1, 6], (number, 3))


def turned(points: Float64, angle_deg: float, axis: tuple[float, float, float] = (0.0, 1.0, 0.0)) -> Float64:
    return points @ rotation_from_axis_angle(np.radians(angle_deg) * np.array(axis)).T


POSE = ring(2, turn_deg=40).second_from_first(0, 1)


@pytest.mark.parametrize("scale", [1.0, 0.2, 30.0])
def test_exact_decodes_agree_and_share_the_first_ones_scale(scale: float) -> None:
    points = some_points()
    matched = decoded(points, POSE, scale=scale).matched()
    assert matched.decode_disagreement_deg < 1e-5
    np.testing.assert_array_equal(matched.first, points)
    np.testing.assert_allclose(matched.second, transform_points(POSE, points), rtol=1e-9)


@settings(max_examples=20)
@given(st.floats(0.01, 175.0), st.integers(0, 10**6))
def test_the_disagreement_is_the_angle_between_the_decodes(angle_deg: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=3)
    axis /= np.linalg.norm(axis)
    exact = decoded(some_points(seed), POSE, scale=float(rng.uniform(0.1, 10)))
    for name in ("first_in_second", "second"):
        other = replace(exact, **{name: turned(getattr(exact, name), angle_deg, tuple(axis))})
        assert other.matched().decode_disagreement_deg == pytest.approx(angle_deg, rel=1e-6, abs=1e-5)


def test_wrong_points_among_the_matches_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    exact = decoded(some_points(), POSE)
    wrong = {}
    for entry in fields(DecodedPoints):
        points = getattr(exact, entry.name).copy()
        points[rng.permutation(100)[:20]] = rng.normal(size=(20, 3)) * 5
        wrong[entry.name] = points
    assert DecodedPoints(**wrong).matched().decode_disagreement_deg < 1e-4


def test_a_plane_fixes_the_rotation() -> None:
    scene = wall(2)
    points = transform_points(scene.poses[0], scene.points)
    exact = decoded(points, scene.second_from_first(0, 1), scale=3.0)
    assert exact.matched().decode_disagreement_deg < 1e-5
    contradicting = replace(exact, first_in_second=turned(exact.first_in_second, 25.0))
    assert contradicting.matched().decode_disagreement_deg == pytest.approx(25)


@pytest.mark.parametrize("along", [np.zeros(3), np.array([0.3, -0.2, 1.0])])
@pytest.mark.parametrize("name", ["first", "second_in_first", "second", "first_in_second", ""])
def test_points_in_one_place_or_on_one_line_contradict(along: Float64, name: str) -> None:
    """In one of the four sets, or in all."""
    exact = decoded(some_points(), POSE)
    line = np.array([0.1, 0.2, 4.0]) + np.linspace(-1, 1, 100)[:, None] * along
    flat = replace(exact, **{name: line}) if name else DecodedPoints(line, line, line, line)
    matched = flat.matched()
    assert matched.decode_disagreement_deg == CONTRADICTION_DEG
    assert np.isfinite(matched.second).all()


def test_what_agrees_lies_on_one_line() -> None:
    """Though all of the points together do not."""
    points = some_points()
    points[:70] = np.array([0.1, 0.2, 4.0]) + np.linspace(-1, 1, 70)[:, None] * np.array([0.3, -0.2, 1.0])
    exact = decoded(points, POSE)
    second = exact.second.copy()
    second[70:] = np.random.default_rng(1).normal(size=(30, 3)) * 5
    assert replace(exact, second=second).matched().decode_disagreement_deg == CONTRADICTION_DEG


def test_too_few_matches_to_tell() -> None:
    points = some_points(number=MIN_MATCHES - 1)
    matched = decoded(points, POSE, scale=3.0).matched()
    assert matched.decode_disagreement_deg == 0
    np.testing.assert_array_equal(matched.second, 3.0 * transform_points(POSE, points))


NOISE = {"pixel_px": 0.5, "depth_relative": 0.03, "log_scale": 0.5, "log_focal": 0.05}


def predictions(
    views: Mapping[str, View], first: str, second: str, **noise: float
) -> tuple[PairPrediction, PairPrediction, tuple[Encoding, Encoding]]:
    model = oracle(views, **noise)
    encodings = dict(zip(sorted(views), model.encode(load(views)), strict=True))
    ((_, forward, backward),) = model.predict([(encodings[first], encodings[second])])
    return forward, backward, (encodings[first], encodings[second])


@pytest.mark.parametrize("views", [room_views(3), plane_views(3)], ids=["room", "plane"])
def test_noisy_decodes_agree_within_the_bound(views: Mapping[str, View]) -> None:
    names = sorted(views)
    forward, backward, encodings = predictions(views, names[0], names[1], **NOISE)
    edge = check_pair((0, 1), match_dense((forward, backward), *encodings), CONFIG, 0)
    assert edge.verdict is Verdict.GOOD
    assert 0.1 < edge.decode_disagreement_deg < 0.6 * CONFIG.max_decode_disagreement_deg


def test_a_decode_of_another_place_makes_the_pair_weak() -> None:
    """The backward decode takes one photo for a third, which the forward one does not."""
    views = object_views(8)
    names = sorted(views)
    forward, right, encodings = predictions(views, names[0], names[1], **NOISE)
    _, wrong, _ = predictions(views, names[0], names[1], outlier_pairs=1.0, **NOISE)
    for backward, verdict in ((right, Verdict.GOOD), (wrong, Verdict.WEAK)):
        edge = check_pair((0, 1), match_dense((forward, backward), *encodings), CONFIG, 0)
        assert edge.verdict is verdict
        assert (edge.points_first is None) == (verdict is Verdict.WEAK)
        assert (edge.decode_disagreement_deg > CONFIG.max_decode_disagreement_deg) == (verdict is Verdict.WEAK)


def test_a_pointmap_that_is_one_point_makes_the_pair_weak() -> None:
    views = room_views(3)
    names = sorted(views)
    forward, backward, encodings = predictions(views, names[0], names[1])

    def collapsed(view: ViewPrediction) -> ViewPrediction:
        return replace(view, points_at=lambda index: (torch.ones(len(index), 3), torch.ones(len(index))))

    flat = replace(backward, first=collapsed(backward.first))
    edge = check_pair((0, 1), match_dense((forward, flat), *encodings), CONFIG, 0)
    assert edge.verdict is Verdict.WEAK
    assert edge.decode_disagreement_deg == CONTRADICTION_DEG
    assert len(edge.xy_first) > 100
    assert edge.points_first is None
    assert check_pair((0, 1), match_dense((forward, backward), *encodings), CONFIG, 0).verdict is Verdict.GOOD
