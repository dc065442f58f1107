"""The uncalibrated two-view check: truth is found, chance is not believed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.epipolar import homogeneous, sampson_error
from mast3r_sfm.matching.check import EpipolarEdge, MatchedPoints, Putative, check_pair, min_significant_inliers
from mast3r_sfm.matching.stored import pack_edges, unpack_edges
from mast3r_sfm.types import Float64, Int64, Verdict
from tests.exact import Scene, random_pixels, ring, street, turning, wall

CONFIG = MatchConfig()


def check(scene: Scene, *, outliers: float = 0.0, noise_px: float = 0.0, seed: int = 0) -> EpipolarEdge:
    putative, _ = scene.putative(0, 1, outliers=outliers, noise_px=noise_px, seed=seed)
    return check_pair((0, 1), putative, CONFIG, seed)


def noise(seed: int, count: int) -> Putative:
    rng = np.random.default_rng(seed)
    return Putative(
        xy_first=random_pixels(rng, count),
        xy_second=random_pixels(rng, count),
        confidence=rng.random(count).astype(np.float32),
        is_distinct=np.ones(count, np.bool_),
    )


def matched(points: Float64, disagreement_deg: float = 0.0) -> MatchedPoints:
    return MatchedPoints(first=points, second=-points, decode_disagreement_deg=disagreement_deg)


def row_set(xy: np.ndarray) -> set[tuple[float, ...]]:
    return set(map(tuple, xy.tolist()))


@pytest.mark.parametrize("outliers", [0.0, 0.3, 0.6])
def test_true_matches_are_found_among_outliers(outliers: float) -> None:
    scene = ring(2, turn_deg=40, seed=3)
    putative, is_true = scene.putative(0, 1, outliers=outliers, noise_px=0.4)
    edge = check_pair((0, 1), putative, CONFIG, 0)
    assert edge.verdict is Verdict.GOOD
    found, true = row_set(edge.xy_first), row_set(putative.xy_first[is_true])
    assert len(found & true) >= 0.97 * len(true)
    # A wrong match stays only where it happens to lie on its epipolar line, a band of 4 of about 600 pixels.
    assert len(found - true) <= 0.03 * len(putative.xy_first)
    assert edge.num_putative == len(putative.xy_first)
    assert edge.inlier_ratio == pytest.approx(len(found) / edge.num_putative)


def test_the_matrices_fit_the_inliers() -> None:
    edge = check(ring(2, turn_deg=40), outliers=0.3)
    assert sampson_error(edge.fundamental, edge.xy_first, edge.xy_second).max() < CONFIG.max_epipolar_error_px
    assert abs(np.linalg.det(edge.fundamental / np.linalg.norm(edge.fundamental))) < 1e-9
    flat = check(wall(2), outliers=0.3)
    mapped = homogeneous(flat.xy_first) @ flat.homography.T
    error = np.linalg.norm(mapped[:, :2] / mapped[:, 2:] - flat.xy_second, axis=1)
    assert np.median(error) < 1e-6


def test_matches_come_best_first_with_their_points() -> None:
    putative, _ = ring(2, turn_deg=40).putative(0, 1, outliers=0.2)
    numbers = np.repeat(np.arange(len(putative.xy_first), dtype=np.float64)[:, None], 3, axis=1)
    tagged = replace(putative, points=lambda chosen: matched(numbers[chosen]))
    edge = check_pair((0, 1), tagged, CONFIG, 0)
    assert (np.diff(edge.confidence) <= 0).all()
    assert edge.points_first is not None
    assert edge.points_second is not None
    origin = edge.points_first[:, 0].astype(int)
    np.testing.assert_array_equal(putative.xy_first[origin], edge.xy_first)
    np.testing.assert_array_equal(putative.xy_second[origin], edge.xy_second)
    np.testing.assert_array_equal(putative.confidence[origin], edge.confidence)
    np.testing.assert_array_equal(edge.points_second, -edge.points_first)


def test_points_are_made_for_links_only() -> None:
    """A pointmap model pays for each point."""
    asked: list[int] = []

    def points(chosen: Int64) -> MatchedPoints:
        asked.append(len(chosen))
        return matched(np.ones((len(chosen), 3)))

    edge = check_pair((0, 1), replace(noise(0, 400), points=points), CONFIG, 0)
    assert edge.verdict is Verdict.WEAK
    assert edge.points_first is None
    assert edge.points_second is None
    assert asked == []
    putative, is_true = ring(2, turn_deg=40).putative(0, 1, outliers=0.5)
    edge = check_pair((0, 1), replace(putative, points=points), CONFIG, 0)
    assert asked == [len(edge.xy_first)]
    assert 0.9 * is_true.sum() < asked[0] < 1.1 * is_true.sum()


def test_chance_is_never_a_link() -> None:
    shares = []
    for seed in range(80):
        count = int(np.random.default_rng([seed, 1]).integers(1, 900))
        edge = check_pair((0, 1), noise(seed, count), CONFIG, seed)
        assert not edge.verdict.is_link
        assert edge.homography_share == 0
        assert not edge.homography.any()
        shares.append(len(edge.xy_first) / min_significant_inliers(count, CONFIG))
    # Otherwise the random matches were no test.
    assert 0.2 < max(shares) < 0.9


@pytest.mark.parametrize(
    ("count", "verdict"),
    [(0, Verdict.TOO_FEW), (7, Verdict.TOO_FEW), (8, Verdict.TOO_FEW), (14, Verdict.TOO_FEW), (15, Verdict.WEAK)],
)
def test_few_matches_are_named_so(count: int, verdict: Verdict) -> None:
    edge = check_pair((3, 5), noise(0, count), CONFIG, 0)
    assert edge.verdict is verdict
    assert (edge.first, edge.second, edge.num_putative) == (3, 5, count)
    assert np.isfinite(edge.fundamental).all()


def test_the_threshold_is_the_documented_one() -> None:
    scene = ring(2, turn_deg=40)
    exact, _ = scene.putative(0, 1)
    for count, verdict in ((17, Verdict.WEAK), (18, Verdict.GOOD)):  # 15 + 0.12·17 = 17.04; 15 + 0.12·18 = 17.16
        edge = check_pair((0, 1), exact.subset(np.arange(count)), CONFIG, 0)
        assert len(edge.xy_first) == count
        assert edge.verdict is verdict


def test_the_same_seed_gives_the_same_edge() -> None:
    one, two = (check(ring(2, turn_deg=40), outliers=0.5, noise_px=1.0, seed=4) for _ in range(2))
    np.testing.assert_array_equal(one.fundamental, two.fundamental)
    np.testing.assert_array_equal(one.xy_first, two.xy_first)
    assert one.homography_share == two.homography_share


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise_px", [0.0, 0.5])
def test_planes_and_turns_are_flat_and_depth_is_not(seed: int, noise_px: float) -> None:
    for scene in (wall(2, seed=seed), turning(2, seed=seed)):
        edge = check(scene, outliers=0.3, noise_px=noise_px, seed=seed)
        assert edge.is_flat
        assert edge.homography_share > 0.9
    deep = check(ring(2, turn_deg=40, seed=seed), outliers=0.3, noise_px=noise_px, seed=seed)
    assert not deep.is_flat
    assert 0 < deep.homography_share < 0.5


def test_a_long_step_forward_is_not_flat() -> None:
    scene = street(6)
    putative, _ = scene.putative(0, 5, outliers=0.2, noise_px=0.3)
    edge = check_pair((0, 5), putative, CONFIG, 0)
    assert edge.verdict is Verdict.GOOD
    assert not edge.is_flat


def test_decodes_that_contradict_each_other_are_weak() -> None:
    putative, _ = ring(2, turn_deg=40).putative(0, 1, outliers=0.3)
    bound = CONFIG.max_decode_disagreement_deg
    for angle, verdict in ((0.0, Verdict.GOOD), (bound, Verdict.GOOD), (bound + 0.01, Verdict.WEAK)):
        ones = np.ones((len(putative.xy_first), 3))
        given = replace(putative, points=lambda chosen, angle=angle, ones=ones: matched(ones[chosen], angle))
        edge = check_pair((0, 1), given, CONFIG, 0)
        assert edge.verdict is verdict
        assert edge.decode_disagreement_deg == angle
        assert (edge.points_first is not None) == (edge.points_second is not None) == (verdict is Verdict.GOOD)
    assert check_pair((0, 1), putative, CONFIG, 0).decode_disagreement_deg == 0


def silent(putative: Putative) -> Putative:
    """The same matches without a say."""
    return replace(putative, is_distinct=np.zeros(len(putative.xy_first), np.bool_))


def joined(*parts: Putative) -> Putative:
    return Putative(
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("xy_first", "xy_second", "confidence", "is_distinct")
        }
    )


def test_matches_that_are_not_distinct_never_decide() -> None:
    """However many agree, and however few others there are."""
    exact, _ = ring(2, turn_deg=40, points=1200).putative(0, 1)
    assert len(exact.xy_first) > 1000
    edge = check_pair((0, 1), silent(exact), CONFIG, 0)
    assert edge.verdict is Verdict.TOO_FEW
    assert (edge.num_putative, edge.num_inliers, edge.inlier_ratio) == (0, 0, 0)
    for few, verdict in ((7, Verdict.TOO_FEW), (14, Verdict.TOO_FEW), (17, Verdict.WEAK), (18, Verdict.GOOD)):
        numbers = np.arange(len(exact.xy_first))
        edge = check_pair((0, 1), replace(exact, is_distinct=numbers < few), CONFIG, 0)
        assert edge.verdict is verdict
        assert edge.num_putative == few
    # Distinct matches that agree with nothing are not carried by others that agree with each other.
    edge = check_pair((0, 1), joined(silent(exact), noise(0, 300)), CONFIG, 0)
    assert edge.verdict is Verdict.WEAK
    assert edge.num_putative == 300
    assert edge.num_inliers < min_significant_inliers(300, CONFIG)


def test_matches_that_are_not_distinct_are_kept_where_they_agree() -> None:
    scene = ring(2, turn_deg=40, points=600)
    exact, _ = scene.putative(0, 1)
    numbers = np.arange(len(exact.xy_first))
    told = joined(exact.subset(numbers < 100), silent(exact.subset(numbers >= 100)), silent(noise(1, 500)))
    edge = check_pair((0, 1), told, CONFIG, 0)
    assert edge.verdict is Verdict.GOOD
    assert edge.num_putative == edge.num_inliers == 100  # what has no say does not count
    assert edge.inlier_ratio == 1
    kept, true = row_set(edge.xy_first), row_set(exact.xy_first)
    assert len(kept & true) == len(true) > 500
    assert len(kept - true) < 0.03 * 500  # those that happen to lie on their epipolar line
    # Each match keeps its own flag, in the order of confidence.
    distinct = row_set(exact.xy_first[:100])
    np.testing.assert_array_equal(edge.is_distinct, [tuple(xy) in distinct for xy in edge.xy_first.tolist()])
    assert not edge.is_distinct[0] or edge.confidence[0] == told.confidence.max()


def test_the_distinct_ones_decide_between_two_motions() -> None:
    """As many others agree with another motion, and are more confident."""
    scene = ring(3, turn_deg=60, points=400)
    true, other = scene.putative(0, 1)[0], scene.putative(0, 2)[0]
    misleading = replace(silent(other), confidence=np.full(len(other.xy_first), 2, np.float32))
    edge = check_pair((0, 1), joined(misleading, true), CONFIG, 0)
    assert edge.num_inliers == edge.num_putative == len(true.xy_first)
    assert edge.verdict is Verdict.GOOD
    assert sampson_error(edge.fundamental, true.xy_first, true.xy_second).max() < 1


def test_a_crowd_decides_where_few_are_distinct() -> None:
    """Of 26 distinct matches, 14 agree with a wrong motion; of those that are not, all that agree are true."""
    scene = ring(3, turn_deg=60, points=600)
    true, other = scene.putative(0, 1)[0], scene.putative(0, 2)[0]
    numbers = np.arange(len(true.xy_first))
    others = other.subset(np.arange(len(other.xy_first)) < 14)
    others = replace(others, confidence=others.confidence + 1)
    told = joined(others, true.subset(numbers < 12), silent(true.subset((numbers >= 12) & (numbers < 112))))
    alone = check_pair((0, 1), told, CONFIG, 0, crowd=1.0)
    assert np.median(sampson_error(alone.fundamental, others.xy_first, others.xy_second)) < 1
    edge = check_pair((0, 1), told, CONFIG, 0)
    assert np.median(sampson_error(edge.fundamental, true.xy_first, true.xy_second)) < 1
    assert edge.num_putative == 26
    assert 12 <= edge.num_inliers < 16


def test_what_is_distinct_and_does_not_agree_is_remembered() -> None:
    exact, is_true = ring(2, turn_deg=40, points=600).putative(0, 1, outliers=0.3)
    edge = check_pair((0, 1), exact, CONFIG, 0)
    everything = row_set(np.concatenate([edge.xy_first, edge.rejected[:, :2]]).astype(np.float32))
    assert everything == row_set(exact.xy_first.astype(np.float32))
    assert 0.8 * (~is_true).sum() < len(edge.rejected) <= (~is_true).sum()
    one, other = edge.judged(10_000)
    assert len(one) == len(other) == edge.num_putative == len(exact.xy_first)
    best = row_set(exact.xy_first[np.argsort(-exact.confidence)[:50]].astype(np.float32))
    assert row_set(edge.judged(50)[0].astype(np.float32)) == best
    weak = check_pair((1, 2), exact.subset(~is_true), CONFIG, 0)
    assert len(weak.rejected) > 50
    for before, after in zip((edge, weak), unpack_edges(pack_edges([edge, weak])), strict=True):
        np.testing.assert_array_equal(after.rejected, before.rejected)
    # Not what had no say, and nothing of a pointmap, whose points it would lack.
    assert len(check_pair((0, 1), silent(exact), CONFIG, 0).rejected) == 0
    pointed = replace(exact, points=lambda numbers: matched(np.zeros((len(numbers), 3))))
    assert check_pair((0, 1), pointed, CONFIG, 0).rejected.shape == (0, 5)
