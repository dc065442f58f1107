"""Thin links between parts are believed only where the slow matcher confirms them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.matching.check import EpipolarEdge, Putative, check_pair
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.hard import (
    MIN_AGREEING,
    MIN_SURE_SHARE,
    SMALL_PART,
    STRONG_EVIDENCE,
    SURE_INLIERS,
    hanging_pairs,
    match_hard_pair,
    settle_hanging_pairs,
)
from mast3r_sfm.matching.stage import Matcher
from mast3r_sfm.models.base import KeypointModel
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.types import Encoding, Verdict, ViewGraph
from tests.exact import Describer, Listener, Scene, all_pairs, no_sift, ring

CONFIG = MatchConfig()
NONE = np.zeros(0, np.int64)


class HardDescriber(Describer):
    """Its slow matcher knows the truth: the keypoints of scene points come first, in the order of the points."""

    def __init__(self, scene: Scene, **values: int) -> None:
        super().__init__(scene, **values)
        self.asked: list[tuple[int, int]] = []
        self.most = 10_000

    def match_hard(self, first: Encoding, second: Encoding) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        views = [self._image(encoding) for encoding in (first, second)]
        self.asked.append((views[0], views[1]))
        seen = [np.flatnonzero(self._scene.sees(view)) for view in views]
        _, rows, columns = np.intersect1d(*seen, return_indices=True)
        pairs = np.stack([rows, columns], axis=1)[: self.most]
        return pairs, np.ones(len(pairs), np.float32)

    def _image(self, encoding: Encoding) -> int:
        return next(image for image, own in enumerate(self.encodings()) if np.array_equal(own.xy, encoding.xy))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def edge(scene: Scene, first: int, second: int, count: int, *, outliers: float = 0.0) -> EpipolarEdge:
    putative, is_true = scene.putative(first, second, outliers=outliers)
    chosen = np.concatenate([np.flatnonzero(is_true)[:count], np.flatnonzero(~is_true)])
    return check_pair((first, second), putative.subset(chosen), CONFIG, 0)


def two_parts(scene: Scene, between: int) -> list[EpipolarEdge]:
    """Strong pairs inside both halves of 8 images, and thin ones between the two, of `between` true matches."""
    edges = []
    for first, second in combinations(range(8), 2):
        inside = (first < 4) == (second < 4)
        edges.append(edge(scene, first, second, 200 if inside else between, outliers=0.0 if inside else 0.3))
    return edges


def answer(scene: Scene, edges: list[EpipolarEdge], count: int, asked: list[int]) -> Callable[[int], EpipolarEdge]:
    def rematch(number: int) -> EpipolarEdge:
        asked.append(number)
        return edge(scene, edges[number].first, edges[number].second, count)

    return rematch


@pytest.fixture
def scene() -> Scene:
    return ring(6, turn_deg=90, points=250)


@pytest.fixture
def halves() -> Scene:
    return ring(8, turn_deg=90, points=250)


def test_strong_collections_are_left_alone(scene: Scene, pool: ThreadPoolExecutor) -> None:
    edges = [edge(scene, first, second, 200) for first, second in combinations(range(6), 2)]
    asked: list[int] = []
    settled = settle_hanging_pairs(edges, 6, answer(scene, edges, 0, asked), pool)
    assert asked == []
    assert all(new is old for new, old in zip(settled, edges, strict=True))


def test_a_confirmed_link_joins_the_parts(halves: Scene, pool: ThreadPoolExecutor) -> None:
    edges = two_parts(halves, between=12)
    asked: list[int] = []
    settled = settle_hanging_pairs(edges, 8, answer(halves, edges, 150, asked), pool)
    assert 1 <= len(set(asked)) == len(asked) <= 2  # one answer is enough
    for number, (old, new) in enumerate(zip(edges, settled, strict=True)):
        assert (new.first, new.second) == (old.first, old.second)
        if number in asked:
            assert new.verdict is Verdict.GOOD
            assert len(new.xy_first) == 150
        else:
            assert new is old


def test_links_that_nothing_confirms_are_weak(halves: Scene, pool: ThreadPoolExecutor) -> None:
    edges = two_parts(halves, between=45)
    thin = [number for number, one in enumerate(edges) if (one.first < 4) != (one.second < 4)]
    assert any(edges[number].verdict.is_link for number in thin)
    assert all(edges[n].num_inliers * edges[n].inlier_ratio ** 2 < STRONG_EVIDENCE for n in thin)
    asked: list[int] = []
    settled = settle_hanging_pairs(edges, 8, answer(halves, edges, 5, asked), pool)
    assert set(asked) <= set(thin)
    assert len(set(asked)) == len(asked) <= 6  # it gives up
    for number, new in enumerate(settled):
        assert new.verdict.is_link == (number not in thin)
        assert new.num_inliers == edges[number].num_inliers  # what nearest neighbours found is still there


def test_a_thinly_held_image_asks_for_its_best_doubtful_pairs(halves: Scene, pool: ThreadPoolExecutor) -> None:
    """Image 7 has one strong pair; all others are strong."""
    edges = []
    for first, second in combinations(range(8), 2):
        true = 200 if second < 7 or first == 6 else 8 + 2 * first
        edges.append(edge(halves, first, second, true, outliers=0.0 if true == 200 else 0.3))
    asked: list[int] = []
    confirm, refuse = answer(halves, edges, 150, asked), answer(halves, edges, 5, asked)
    doubtful = [number for number, one in enumerate(edges) if one.second == 7 and one.first < 6]
    unsure = replace(edge(halves, 0, 7, 100), num_putative=round(100 / MIN_SURE_SHARE) + 1)
    best = sorted(doubtful, key=lambda number: -edges[number].num_inliers)[:3]

    def rematch(number: int) -> EpipolarEdge:
        if number == best[1]:
            asked.append(number)
            return unsure
        return confirm(number) if number == best[0] else refuse(number)

    settled = settle_hanging_pairs(edges, 8, rematch, pool)
    assert sorted(asked) == sorted(best)
    for number, (old, new) in enumerate(zip(edges, settled, strict=True)):
        if number == best[0]:
            assert new.verdict is Verdict.GOOD
            assert new.num_inliers == 150
        else:
            assert new is old  # nothing better is known of it


def test_nothing_to_settle(pool: ThreadPoolExecutor) -> None:
    def never(number: int) -> EpipolarEdge:
        raise AssertionError(number)

    assert settle_hanging_pairs([], 3, never, pool) == []


def test_a_pair_is_matched_by_the_slow_matcher(scene: Scene) -> None:
    model = HardDescriber(scene, strangers=100)
    assert isinstance(model, KeypointModel)
    encodings = model.encodings()
    checker = PairChecker(model=model, encodings=encodings, config=CONFIG, seed=0, threads=1)
    nothing = scene.putative(2, 4)[0].subset(NONE)
    found = match_hard_pair(checker, model, (2, 4), (encodings[2], encodings[4]), lambda: nothing)
    assert (found.first, found.second) == (2, 4)
    assert found.verdict is Verdict.GOOD
    assert found.num_putative == len(found.xy_first) == int((scene.sees(2) & scene.sees(4)).sum())
    distance = np.linalg.norm(found.xy_first[:, None] - scene.project(2), axis=2).min(axis=1)
    assert distance.max() < 1e-3


def hard_edge(scene: Scene, slow: int, others: Putative) -> EpipolarEdge:
    """Images 2 and 4 by the slow matcher, which finds so many true matches, and `others` of nearest neighbours."""
    model = HardDescriber(scene)
    encodings = model.encodings()
    model.most = slow
    checker = PairChecker(model=model, encodings=encodings, config=CONFIG, seed=0, threads=1)
    return match_hard_pair(checker, model, (2, 4), (encodings[2], encodings[4]), lambda: others)


@pytest.mark.parametrize("found", [0, CONFIG.min_inliers - 1])
def test_nearest_neighbours_are_not_asked_where_the_slow_matcher_finds_too_little(scene: Scene, found: int) -> None:
    model = HardDescriber(scene)
    encodings = model.encodings()
    model.most = found
    checker = PairChecker(model=model, encodings=encodings, config=CONFIG, seed=0, threads=1)

    def never() -> Putative:
        raise AssertionError

    edge = match_hard_pair(checker, model, (2, 4), (encodings[2], encodings[4]), never)
    assert edge.verdict is Verdict.TOO_FEW


def told(scene: Scene, true: int, wrong: int, distinct: bool = True) -> Putative:
    """So many true matches of images 2 and 4, and so many that agree with nothing."""
    putative, is_true = scene.putative(2, 4, outliers=0.5, seed=3)
    chosen = putative.subset(np.concatenate([np.flatnonzero(is_true)[:true], np.flatnonzero(~is_true)[:wrong]]))
    return replace(chosen, is_distinct=np.full(len(chosen.xy_first), distinct))


class TestConfirmation:
    """Nearest neighbours must agree with the slow matcher where it finds few matches."""

    def test_what_they_contradict_is_weak(self, scene: Scene) -> None:
        edge = hard_edge(scene, 60, told(scene, 0, 100))
        assert edge.verdict is Verdict.WEAK
        assert edge.num_inliers == edge.num_putative == 60

    def test_what_they_say_nothing_of_is_weak(self, scene: Scene) -> None:
        assert hard_edge(scene, 60, told(scene, 0, 0)).verdict is Verdict.WEAK
        assert hard_edge(scene, 60, told(scene, 100, 0, distinct=False)).verdict is Verdict.WEAK

    @pytest.mark.parametrize(
        ("true", "wrong", "verdict"),
        [
            (MIN_AGREEING - 1, 0, Verdict.WEAK),
            (MIN_AGREEING, 0, Verdict.GOOD),
            (60, 100, Verdict.GOOD),
            (20, 100, Verdict.WEAK),  # a sixth
        ],
    )
    def test_enough_of_them_confirm_it(self, scene: Scene, true: int, wrong: int, verdict: Verdict) -> None:
        assert hard_edge(scene, 60, told(scene, true, wrong)).verdict is verdict

    @pytest.mark.parametrize(("slow", "verdict"), [(SURE_INLIERS - 1, Verdict.WEAK), (SURE_INLIERS, Verdict.GOOD)])
    def test_many_matches_need_no_confirmation(self, scene: Scene, slow: int, verdict: Verdict) -> None:
        assert hard_edge(scene, slow, told(scene, 0, 100)).verdict is verdict

    def test_they_have_no_say_in_the_geometry(self, scene: Scene) -> None:
        """Too few slow matches are no link, whatever nearest neighbours find."""
        edge = hard_edge(scene, 10, told(scene, 150, 0))
        assert edge.verdict is Verdict.TOO_FEW
        assert edge.num_putative == 10

    def test_they_are_kept_where_they_agree(self, scene: Scene) -> None:
        others = told(scene, 80, 80)
        edge = hard_edge(scene, 130, others)
        assert edge.num_inliers == edge.num_putative == 130
        assert 130 + 40 < len(edge.xy_first) < 130 + 90
        assert edge.verdict is Verdict.GOOD


def strong_edges(scene: Scene, groups: list[range], between: int = 30) -> list[EpipolarEdge]:
    """All pairs: strong ones inside the groups, thin ones between them."""
    edges = []
    for first, second in combinations(range(len(scene.poses)), 2):
        inside = any(first in group and second in group for group in groups)
        edges.append(edge(scene, first, second, 200 if inside else between, outliers=0.0 if inside else 0.4))
    return edges


def test_pairs_hang_between_parts_and_inside_small_ones() -> None:
    scene = ring(SMALL_PART + 3, turn_deg=90, points=250)
    number = SMALL_PART + 3
    whole = strong_edges(scene, [range(number)])
    assert hanging_pairs(whole, number) == []
    large, small = range(SMALL_PART), range(SMALL_PART, number)
    parts = strong_edges(scene, [large, small])
    hanging = [parts[index] for index in hanging_pairs(parts, number)]
    expected = [one for one in parts if one.second in small]  # between the parts, or inside the small one
    assert [(one.first, one.second) for one in hanging] == [(one.first, one.second) for one in expected]
    # One image less makes all of it small.
    less = [one for one in parts if one.first != 0 and one.second != 0]
    assert hanging_pairs(less, number) == list(range(len(less)))
    assert hanging_pairs([], number) == []


def test_evidence_is_of_distinct_matches(scene: Scene) -> None:
    """Matches without a say make no pair strong."""
    strong = strong_edges(scene, [range(6)])
    assert all(one.num_inliers * one.inlier_ratio**2 >= STRONG_EVIDENCE for one in strong)
    mute = [replace(one, is_distinct=np.arange(len(one.xy_first)) < STRONG_EVIDENCE - 1) for one in strong]
    asked: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        settled = settle_hanging_pairs(mute, 6, answer(scene, mute, 0, asked), pool)
    assert asked
    assert not any(one.verdict.is_link for one in settled)


def make_matcher(scene: Scene) -> tuple[Matcher, HardDescriber]:
    """Between the halves, descriptors tell next to nothing: the slow matcher has to."""
    model = HardDescriber(scene, strangers=50)
    encodings = model.encodings()
    rng = np.random.default_rng(0)
    for image in range(3, 6):
        tokens = encodings[image].tokens.astype(np.float64)
        names = np.random.default_rng(1).normal(size=(250, 64))
        seen = scene.sees(image)
        tokens[: seen.sum()] = names[seen] + 0.2 * rng.normal(size=(seen.sum(), 64))
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        encodings[image] = replace(encodings[image], tokens=tokens.astype(np.float16))
    checker = PairChecker(model=model, encodings=encodings, config=replace(CONFIG, features="model"), seed=0, threads=2)
    return Matcher(checker=checker, num_images=6, detect_sift=no_sift), model


def test_the_stage_asks_once_and_remembers_the_answer(scene: Scene, tmp_path: Path) -> None:
    matcher, model = make_matcher(scene)
    cache = StageCache(tmp_path, "match", "key", Listener())
    edges, resumed = matcher.check_graph(all_pairs(6), cache, Listener())
    assert resumed == 0
    between = [one for one in edges if (one.first < 3) != (one.second < 3)]
    assert 1 <= len(model.asked) <= 2
    assert sum(one.verdict.is_link for one in between) == len(model.asked)
    again, resumed = matcher.check_graph(all_pairs(6), cache, Listener())
    assert resumed == 2
    assert len(model.asked) <= 2
    for one, two in zip(edges, again, strict=True):
        assert one.verdict is two.verdict
        np.testing.assert_array_equal(one.xy_first, two.xy_first)
        np.testing.assert_array_equal(one.fundamental, two.fundamental)


def test_a_graph_without_pairs(scene: Scene, tmp_path: Path) -> None:
    matcher, _ = make_matcher(scene)
    none = ViewGraph(
        num_images=6,
        pairs=np.zeros((0, 2), np.int32),
        score=np.zeros(0, np.float32),
        reason=np.zeros(0, np.int32),
    )
    edges, _ = matcher.check_graph(none, StageCache(tmp_path, "match", "key", Listener()), Listener())
    assert edges == []
