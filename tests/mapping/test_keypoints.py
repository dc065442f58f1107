"""Shared keypoints: one per place, whichever pairs it comes from, in tracks that see each image once."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.mapping.keypoints import share_keypoints
from mast3r_sfm.types import Bool, Float64, PairMatches, Verdict
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


Keypoint = tuple[int, int]
"""Image and number of the keypoint in it."""


@st.composite
def collections(draw: st.DrawFn) -> list[PairMatches]:
    """Pairs on a coarse grid, so that pixels repeat within and between pairs, and so do confidences between pairs."""
    chosen = draw(st.lists(st.sampled_from(list(combinations(range(NUMBER), 2))), unique=True, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    matches = []
    for first, second in chosen:
        count = draw(st.integers(0, 12))
        xy = rng.integers(0, 4, (2, count, 2)) + 0.5
        matches.append(pair(first, second, xy[0], xy[1], rng.permutation(count).tolist()))
    return matches


@st.composite
def crowds(draw: st.DrawFn) -> list[PairMatches]:
    """All pairs of four images, with pixels so dense that many lie within a pixel of each other."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    count, side = draw(st.integers(0, 12)), draw(st.floats(1, 12))
    # Confidences whose sums are exact, so that no order of adding makes a difference.
    return [
        pair(*both, *rng.uniform(0, side, (2, count, 2)), (rng.integers(0, 9, count) / 4).tolist())
        for both in combinations(range(NUMBER), 2)
    ]


def named(matches: list[PairMatches], radius_px: float = 0.0) -> dict[tuple[int, int], set[tuple[float, ...]]]:
    """The kept matches of every pair as pixels of their keypoints."""
    keypoints, indices = share_keypoints(matches, NUMBER, radius_px)
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


@given(collections(), st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_does_not_matter(matches: list[PairMatches], random: Random) -> None:
    shuffled = list(matches)
    random.shuffle(shuffled)
    for one, other in zip(share_keypoints(matches, NUMBER)[0], share_keypoints(shuffled, NUMBER)[0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert named(matches) == named(shuffled)


@given(collections())
def test_the_most_confident_match_of_all_always_stays(matches: list[PairMatches]) -> None:
    """Of several, the first by its keypoints; of a pair alone, its most confident match stays, too."""
    kept = named(matches)
    best = [
        (-match.confidence[row], match.first, *match.xy_first[row], match.second, *match.xy_second[row])
        for match in matches
        for row in range(len(match))
    ]
    if best:
        _, first, *xy_first, second, x, y = min(best)
        assert (*xy_first, x, y) in kept[first, second]
    for match in matches:
        if len(match):
            row = int(match.confidence.argmax())
            alone = named([match])[match.first, match.second]
            assert (*match.xy_first[row], *match.xy_second[row]) in alone


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


def gathered(xy: Float64, confidence: list[float], radius_px: float) -> tuple[Float64, list[int]]:
    """The keypoints of an image with such pixels, and the keypoint of each pixel; all else is apart."""
    apart = 1000.0 * np.arange(1, len(xy) + 1)[:, None] + np.zeros((1, 2))
    matches = [pair(0, 1 + row, xy[[row]], apart[[row]], [confidence[row]]) for row in range(len(xy))]
    keypoints, indices = share_keypoints(matches, len(xy) + 1, radius_px)
    return keypoints[0], [int(indices[0, 1 + row][0, 0]) for row in range(len(xy))]


def gathered_plainly(xy: Float64, confidence: list[float], radius_px: float) -> tuple[Float64, list[int]]:
    """The same one after the other: the heaviest place takes the free ones around it, until none are too near."""
    places: dict[tuple[float, float], float] = {}
    for one, sure in zip(xy.astype(np.float32).tolist(), confidence, strict=True):
        places[tuple(one)] = places.get(tuple(one), 0.0) + max(sure, 1e-3)
    became = {place: place for place in places}
    while True:
        order = sorted(places, key=lambda place: (-places[place], place))
        moved: dict[tuple[float, float], tuple[float, float]] = {}
        merged: dict[tuple[float, float], float] = {}
        for centre in order:
            if centre in moved:
                continue
            group = [
                place for place in order if place not in moved and np.hypot(*np.subtract(place, centre)) <= radius_px
            ]
            weight = [places[place] for place in group]
            mean = np.average(group, axis=0, weights=weight) if len(group) > 1 else np.array(centre)
            new = tuple(mean.astype(np.float32).tolist())
            moved |= dict.fromkeys(group, new)
            merged[new] = merged.get(new, 0.0) + sum(weight)
        became = {start: moved[place] for start, place in became.items()}
        if len(merged) == len(places):
            break
        places = merged
    keypoints = sorted(places)
    number = {place: row for row, place in enumerate(keypoints)}
    return np.array(keypoints), [number[became[tuple(one)]] for one in xy.astype(np.float32).tolist()]


@given(st.integers(0, 10_000), st.integers(1, 60), st.floats(0.5, 15), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_gathering_is_that_of_the_plain_reference(seed: int, count: int, side: float, radius_px: float) -> None:
    rng = np.random.default_rng(seed)
    xy, confidence = rng.uniform(0, side, (count, 2)), (rng.integers(0, 9, count) / 4).tolist()
    keypoints, numbers = gathered(xy, confidence, radius_px)
    expected, plainly = gathered_plainly(xy, confidence, radius_px)
    np.testing.assert_allclose(keypoints, expected, rtol=0, atol=1e-5)
    assert numbers == plainly


@given(crowds(), st.floats(0.1, 3))
def test_no_two_keypoints_lie_within_the_radius(matches: list[PairMatches], radius_px: float) -> None:
    for xy in share_keypoints(matches, NUMBER, radius_px)[0]:
        distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
        assert (distance + np.where(np.eye(len(xy)), np.inf, 0) > radius_px).all()
        np.testing.assert_array_equal(xy[np.lexsort(xy.T[::-1])], xy)
        np.testing.assert_array_equal(xy.astype(np.float32), xy)


def test_a_keypoint_stands_at_the_weighted_mean_of_its_pixels() -> None:
    xy = np.array([[10.0, 20.0], [10.5, 20.0], [10.0, 20.4], [40.0, 20.0]])
    keypoints, numbers = gathered(xy, [2.0, 1.0, 1.0, 5.0], 1.0)
    assert numbers == [0, 0, 0, 1]
    np.testing.assert_allclose(keypoints, [[10.125, 20.1], [40.0, 20.0]], atol=1e-5)
    # A pixel of several matches weighs as all of them; without confidence, all pixels weigh alike.
    keypoints, _ = gathered(xy[[0, 1, 1, 1]], [1.0, 1.0, 1.0, 1.0], 1.0)
    np.testing.assert_allclose(keypoints, [[10.375, 20.0]], atol=1e-5)
    keypoints, _ = gathered(xy[:2], [0.0, 0.0], 1.0)
    np.testing.assert_allclose(keypoints, [[10.25, 20.0]], atol=1e-5)


@pytest.mark.parametrize(("distance", "count"), [(0.999, 1), (1.001, 2)])
def test_the_radius_is_that_of_the_distance(distance: float, count: int) -> None:
    xy = np.array([[10.0, 20.0], [10.0 + 0.6 * distance, 20.0 + 0.8 * distance]])
    assert len(gathered(xy, [1.0, 1.0], 1.0)[0]) == count


def test_a_chain_of_near_pixels_does_not_become_one_keypoint() -> None:
    """Each is within the radius of the next, and the first is far from the last."""
    xy = np.array([[0.75 * step + 5, 5.0] for step in range(20)])
    keypoints, numbers = gathered(xy, [1.0] * 20, 1.0)
    assert 5 < len(keypoints) <= 14
    assert (np.diff(keypoints[:, 0]) > 1).all()
    assert np.abs(keypoints[numbers, 0] - xy[:, 0]).max() < 2
    # The heaviest pixel gathers those about it, wherever in the chain it is.
    keypoints, numbers = gathered(xy[:3], [1.0, 9.0, 1.0], 1.0)
    assert numbers == [0, 0, 0]
    np.testing.assert_allclose(keypoints, [[5.75, 5.0]], atol=1e-5)
    # Between two heavy ones, a pixel goes to the heavier, though that one is farther.
    keypoints, numbers = gathered(np.array([[0.0, 0.0], [0.9, 0.0], [1.7, 0.0]]), [9.0, 0.001, 5.0], 1.0)
    assert numbers == [0, 0, 1]


@given(collections())
def test_without_a_radius_pixels_are_keypoints(matches: list[PairMatches]) -> None:
    """And so they are with one that is less than their distances."""
    assert named(matches, 0.0) == named(matches) == named(matches, 0.99)


@given(crowds(), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.5, 1.0, 2.5]))
def test_the_order_of_the_pairs_does_not_matter_within_a_radius(
    matches: list[PairMatches], random: Random, radius_px: float
) -> None:
    shuffled = list(matches)
    random.shuffle(shuffled)
    (one, table), (other, again) = (share_keypoints(some, NUMBER, radius_px) for some in (matches, shuffled))
    for left, right in zip(one, other, strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)
    for both, indices in table.items():
        np.testing.assert_array_equal(indices, again[both])


def tied(table: dict[tuple[int, int], np.ndarray]) -> list[tuple[Keypoint, Keypoint]]:
    """The matches as keypoints."""
    return [((i, a), (j, b)) for (i, j), rows in table.items() for a, b in rows.tolist()]


def in_parts(links: list[tuple[Keypoint, Keypoint]]) -> list[set[Keypoint]]:
    """What links hold together."""
    parts: list[set[Keypoint]] = []
    for one, two in links:
        touched = [part for part in parts if one in part or two in part]
        parts = [part for part in parts if part not in touched] + [set().union({one, two}, *touched)]
    return parts


def is_consistent(part: set[Keypoint]) -> bool:
    return len({image for image, _ in part}) == len(part)


def one_to_one_plainly(matches: list[PairMatches], keypoints: list[Float64]) -> dict[tuple[Keypoint, Keypoint], float]:
    """The matches of keypoints at their very pixels, most confident first within a pair, each keypoint once in it."""
    number = [{tuple(xy): row for row, xy in enumerate(one.tolist())} for one in keypoints]
    kept: dict[tuple[Keypoint, Keypoint], float] = {}
    for match in matches:
        best: list[dict[int, int]] = [{}, {}]
        ends = [
            (number[match.first][tuple(one)], number[match.second][tuple(two)])
            for one, two in zip(match.xy_first.tolist(), match.xy_second.tolist(), strict=True)
        ]
        order = np.argsort(-match.confidence, kind="stable").tolist()
        # First each keypoint of the first image chooses, and then, of what is left, each of the second.
        for row in order:
            best[0].setdefault(ends[row][0], row)
        for row in (row for row in order if best[0][ends[row][0]] == row):
            best[1].setdefault(ends[row][1], row)
        for row in best[1].values():
            kept[(match.first, ends[row][0]), (match.second, ends[row][1])] = float(match.confidence[row])
    return kept


def split_plainly(links: dict[tuple[Keypoint, Keypoint], float]) -> set[tuple[Keypoint, Keypoint]]:
    """The most confident first: a link that would bring two keypoints of one image together is none."""
    kept: list[tuple[Keypoint, Keypoint]] = []
    for link in sorted(links, key=lambda link: (-links[link], link)):
        if all(is_consistent(part) for part in in_parts([*kept, link])):
            kept.append(link)
    return set(kept)


@given(collections())
def test_splitting_is_that_of_the_plain_reference(matches: list[PairMatches]) -> None:
    keypoints, table = share_keypoints(matches, NUMBER)
    links = one_to_one_plainly(matches, keypoints)
    assert set(tied(table)) == split_plainly(links)


@given(st.one_of(collections(), crowds()), st.sampled_from([0.0, 1.0]))
def test_no_track_holds_two_keypoints_of_one_image(matches: list[PairMatches], radius_px: float) -> None:
    _, table = share_keypoints(matches, NUMBER, radius_px)
    assert all(is_consistent(part) for part in in_parts(tied(table)))


@given(collections())
def test_matches_that_contradict_nothing_stay(matches: list[PairMatches]) -> None:
    keypoints, table = share_keypoints(matches, NUMBER)
    links = one_to_one_plainly(matches, keypoints)
    kept = set(tied(table))
    for part in in_parts(list(links)):
        if is_consistent(part):
            assert {link for link in links if link[0] in part} <= kept


def test_a_contradiction_costs_the_least_confident_match() -> None:
    """Images 0, 1 and 2 see one point; the pair (0, 2) errs, and leads from it to another of image 0."""
    one, two, wrong = (np.array([[xy, xy]]) for xy in (10.5, 20.5, 50.5))
    for doubt, lost in ((0, (0, 1)), (1, (1, 2)), (2, (0, 2))):
        confidence = [[0.9], [0.9], [0.9]]
        confidence[doubt] = [0.4]
        matches = [
            pair(0, 1, one, one, confidence[0]),
            pair(1, 2, one, two, confidence[1]),
            pair(0, 2, wrong, two, confidence[2]),
        ]
        assert {both for both, rows in named(matches).items() if not rows} == {lost}


def test_within_a_track_all_matches_stay() -> None:
    """Also those that are not needed to hold it together, where a doubtful one is dropped beside them."""
    xy = [np.array([[10.5 + image, 20.5], [40.5 + image, 60.5]]) for image in range(3)]
    good = [pair(i, j, xy[i], xy[j], [0.9, 0.8]) for i, j in combinations(range(3), 2)]
    # The first point of image 2, and the second of image 0, in one of image 3.
    matches = [*good, pair(2, 3, xy[2][:1], xy[0][:1], [0.7]), pair(0, 3, xy[0][1:], xy[0][:1], [0.6])]
    kept = named(matches)
    assert [len(kept[match.first, match.second]) for match in matches] == [2, 2, 2, 1, 0]


def test_exact_tracks_are_as_long_as_points_are_seen() -> None:
    """With half a pixel of noise of each pair's own, and a radius that covers it."""
    scene = ring(6, turn_deg=90, points=100)
    rng = np.random.default_rng(0)
    matches = []
    for both in combinations(range(6), 2):
        match = scene.matches(*both)
        noise = rng.uniform(-0.25, 0.25, (2, len(match), 2))
        matches.append(replace(match, xy_first=match.xy_first + noise[0], xy_second=match.xy_second + noise[1]))
    seen = np.sum([scene.sees(image) for image in range(6)], axis=0)
    _, table = share_keypoints(matches, 6, 1.0)
    lengths = [len(part) for part in in_parts(tied(table))]
    assert 0.97 * seen.mean() < np.mean(lengths) <= 6
    assert 0.95 * len(scene.points) < len(lengths) < 1.05 * len(scene.points)
    # Without the radius there is none that is seen by three.
    alone = [len(part) for part in in_parts(tied(share_keypoints(matches, 6)[1]))]
    assert max(alone) == 2


def test_where_a_mask_hides_the_mean_the_most_confident_stays() -> None:
    # Three pairs see one place of image 0 at pixels 0.8 apart; the mean lies between them.
    xy, partner = np.array([[10.2, 5.0], [11.0, 5.0], [10.2, 5.4]]), np.array([[3.0, 4.0]])
    matches = [pair(0, other + 1, xy[other][None], partner, [weight]) for other, weight in enumerate([1.0, 3.0, 1.0])]
    (free, *_), _ = share_keypoints(matches, 4, 1.0)
    np.testing.assert_allclose(free, [[10.68, 5.08]], atol=1e-4)

    def usable(image: int, places: Float64) -> Bool:
        hidden = (image == 0) & (np.floor(places[:, 0]) == 10)
        return ~hidden

    (kept, *_), indices = share_keypoints(matches, 4, 1.0, usable=usable)
    np.testing.assert_allclose(kept, [[11.0, 5.0]], atol=1e-6)
    assert [indices[0, other].tolist() for other in (1, 2, 3)] == [[[0, 0]]] * 3
