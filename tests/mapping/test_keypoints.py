"""Shared keypoints: one per pixel, whichever pairs it comes from."""

from __future__ import annotations

from itertools import combinations
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.mapping.keypoints import share_keypoints
from mast3r_sfm.types import Float64, PairMatches, Verdict
from tests.exact import ring

NUMBER = 4


def pair(first: int, second: int, xy_first: Float64, xy_second: Float64, confidence: list[float]) -> PairMatches:
    return PairMatches(
        first=first,
        second=second,
        xy_first=xy_first,
        xy_second=xy_second,
        confidence=np.array(confidence, np.float32),
        points_first=np.ones((len(confidence), 3)),
        points_second=np.ones((len(confidence), 3)),
        verdict=Verdict.GOOD,
        inlier_ratio=1.0,
    )


@st.composite
def collections(draw: st.DrawFn) -> list[PairMatches]:
    """Pairs on a coarse grid, so that pixels repeat within and between pairs."""
    chosen = draw(st.lists(st.sampled_from(list(combinations(range(NUMBER), 2))), unique=True, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    matches = []
    for first, second in chosen:
        count = draw(st.integers(0, 12))
        xy = rng.integers(0, 4, (2, count, 2)) + 0.5
        matches.append(pair(first, second, xy[0], xy[1], rng.permutation(count).tolist()))
    return matches


def named(matches: list[PairMatches]) -> dict[tuple[int, int], set[tuple[float, ...]]]:
    """The kept matches of every pair as pixels."""
    keypoints, indices = share_keypoints(matches, NUMBER)
    return {
        (i, j): {(*keypoints[i][a], *keypoints[j][b]) for a, b in table.tolist()} for (i, j), table in indices.items()
    }


@given(collections())
def test_every_pixel_is_one_keypoint(matches: list[PairMatches]) -> None:
    keypoints, indices = share_keypoints(matches, NUMBER)
    assert len(keypoints) == NUMBER
    for image in range(NUMBER):
        expected = set()
        for match in matches:
            if match.first == image:
                expected |= set(map(tuple, match.xy_first.tolist()))
            if match.second == image:
                expected |= set(map(tuple, match.xy_second.tolist()))
        assert keypoints[image].tolist() == [list(xy) for xy in sorted(expected)]
    assert set(indices) == {(match.first, match.second) for match in matches}


@given(collections())
def test_pairs_are_one_to_one_and_keep_only_their_own_matches(matches: list[PairMatches]) -> None:
    _, indices = share_keypoints(matches, NUMBER)
    for match in matches:
        table = indices[match.first, match.second]
        assert table.dtype == np.uint32
        for side in (0, 1):
            assert len(np.unique(table[:, side])) == len(table)
        given_matches = {
            (*one, *two) for one, two in zip(match.xy_first.tolist(), match.xy_second.tolist(), strict=True)
        }
        assert named(matches)[match.first, match.second] <= given_matches
        assert (len(table) > 0) == (len(match) > 0)


@given(collections(), st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_does_not_matter(matches: list[PairMatches], random: Random) -> None:
    shuffled = list(matches)
    random.shuffle(shuffled)
    for one, other in zip(share_keypoints(matches, NUMBER)[0], share_keypoints(shuffled, NUMBER)[0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert named(matches) == named(shuffled)


@given(collections())
def test_the_most_confident_match_always_stays(matches: list[PairMatches]) -> None:
    kept = named(matches)
    for match in matches:
        if len(match):
            best = int(match.confidence.argmax())
            assert (*match.xy_first[best], *match.xy_second[best]) in kept[match.first, match.second]


def test_of_two_claims_on_a_keypoint_the_more_confident_wins() -> None:
    xy = np.array([[1.5, 1.5], [1.5, 1.5], [2.5, 2.5]])
    other = np.array([[5.5, 5.5], [6.5, 6.5], [6.5, 6.5]])
    assert named([pair(0, 1, xy, other, [0.5, 0.9, 0.7])]) == {(0, 1): {(1.5, 1.5, 6.5, 6.5)}}
    assert named([pair(0, 1, xy, other, [0.5, 0.4, 0.7])])[0, 1] == {(1.5, 1.5, 5.5, 5.5), (2.5, 2.5, 6.5, 6.5)}


def test_what_the_database_stores_as_one_number_is_one_keypoint() -> None:
    xy = np.array([[1000.123456789, 5.0]])
    keypoints, _ = share_keypoints([pair(0, 1, xy, xy, [1.0]), pair(0, 2, xy + 1e-9, xy, [1.0])], 3)
    assert len(keypoints[0]) == 1
    assert keypoints[0].dtype == np.float64
    np.testing.assert_array_equal(keypoints[0].astype(np.float32), keypoints[0])


def test_exact_matches_join_into_tracks_over_all_images() -> None:
    scene = ring(NUMBER, turn_deg=60, points=80)
    matches = [scene.matches(*both) for both in combinations(range(NUMBER), 2)]
    keypoints, indices = share_keypoints(matches, NUMBER)
    assert [len(xy) for xy in keypoints] == [80] * NUMBER
    for (i, j), table in indices.items():
        assert len(table) == 80
        # Keypoint numbers back to the points of the scene, in both images.
        first, second = (np.lexsort(scene.project(image).astype(np.float32).T[::-1]) for image in (i, j))
        np.testing.assert_array_equal(first[table[:, 0]], second[table[:, 1]])
