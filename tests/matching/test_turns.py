"""Depth among photos of one centre is not believed, and real depth is not taken away."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np

from mast3r_sfm.matching.turns import settle_turns
from mast3r_sfm.types import PairMatches, Verdict
from tests.exact import ring


def pair(first: int, second: int, verdict: Verdict, count: int) -> PairMatches:
    match = ring(2, turn_deg=40).matches(0, 1)
    depth = slice(count if verdict.has_depth else 0)
    return replace(
        match,
        first=first,
        second=second,
        verdict=verdict,
        xy_first=match.xy_first[:count],
        xy_second=match.xy_second[:count],
        confidence=match.confidence[:count],
        points_first=match.points_first[depth],
        points_second=match.points_second[depth],
    )


def untouched(matches: list[PairMatches], num_images: int) -> bool:
    settled = settle_turns(matches, num_images)
    return len(settled) == len(matches) and all(new is old for new, old in zip(settled, matches, strict=True))


def test_a_lone_deep_pair_among_turns_is_weak() -> None:
    turns = [pair(i, j, Verdict.PURE_ROTATION, 200) for i, j in combinations(range(4), 2) if (i, j) != (0, 3)]
    settled = settle_turns([*turns, pair(0, 3, Verdict.GOOD, 60)], 5)
    assert [match.verdict for match in settled] == [Verdict.PURE_ROTATION] * 5 + [Verdict.WEAK]
    last = settled[-1]
    assert (last.first, last.second, len(last)) == (0, 3, 0)
    np.testing.assert_array_equal(last.second_from_first, np.eye(3, 4))


def test_turns_of_a_slow_video_leave_its_depth_alone() -> None:
    matches = [pair(i, i + 1, Verdict.PURE_ROTATION, 200) for i in range(5)]
    matches += [pair(i, j, Verdict.GOOD, 150) for i, j in combinations(range(6), 2) if j - i > 2]
    assert untouched(matches, 6)


def test_depth_towards_other_places_is_not_touched() -> None:
    """Turns on a tripod, and a second tripod: what ties the two has depth."""
    turns = [pair(i, j, Verdict.PURE_ROTATION, 200) for i, j in ((0, 1), (1, 2), (0, 2), (3, 4))]
    between = [pair(2, 3, Verdict.GOOD, 25), pair(0, 4, Verdict.PLANAR, 25)]
    weak = [pair(1, 4, Verdict.WEAK, 0)]
    assert untouched(turns + between + weak, 5)


def test_nothing_to_settle() -> None:
    assert settle_turns([], 3) == []
    matches = [pair(0, 1, Verdict.GOOD, 100), pair(1, 2, Verdict.TOO_FEW, 0)]
    assert untouched(matches, 3)
