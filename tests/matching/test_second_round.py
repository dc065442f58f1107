"""Which pairs a second round proposes, and what it finds on exact scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.matching.check import EpipolarEdge, check_pair
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.second_round import propose_pairs
from mast3r_sfm.matching.stage import Matcher
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.types import Reason, ViewGraph
from tests.exact import Describer, Listener, Scene, no_sift, ring

CONFIG = MatchConfig(features="model")
Pairs = Sequence[tuple[int, int]]


@pytest.fixture(scope="module")
def scene() -> Scene:
    return ring(8, turn_deg=60, points=250)


def graph(pairs: Pairs, score: Sequence[float] | None = None, num_images: int = 8) -> ViewGraph:
    order = sorted(range(len(pairs)), key=lambda number: pairs[number])
    scores = np.full(len(pairs), 0.5) if score is None else np.array(score)
    return ViewGraph(
        num_images=num_images,
        pairs=np.array([pairs[number] for number in order], np.int32).reshape(-1, 2),
        score=scores[order].astype(np.float32),
        reason=np.full(len(pairs), Reason.SECOND_ROUND, np.int32),
    )


def edge(scene: Scene, first: int, second: int, count: int = 200) -> EpipolarEdge:
    putative, is_true = scene.putative(first, second)
    return check_pair((first, second), putative.subset(np.flatnonzero(is_true)[:count]), CONFIG, 0)


def chain(scene: Scene, images: range) -> list[EpipolarEdge]:
    return [edge(scene, image, image + 1) for image in images[:-1]]


def test_friends_of_friends(scene: Scene) -> None:
    edges = chain(scene, range(8))
    found = propose_pairs(edges, graph([(0, 7)]), 5)
    assert found == [(image, image + 2) for image in range(6)]  # all one part: the reserve is not asked


def test_a_failed_pair_makes_no_friends_and_is_not_tried_again(scene: Scene) -> None:
    failed = [edge(scene, 0, 2, count=5), edge(scene, 2, 3, count=5)]
    assert not any(one.verdict.is_link for one in failed)
    found = propose_pairs([*chain(scene, range(3)), *failed], graph([], num_images=4), 5)
    assert found == []


def test_the_strongest_chains_come_first(scene: Scene) -> None:
    # Image 0 reaches 5, 6 and 7 through 1 by links of falling strength, and nothing else.
    edges = [edge(scene, 0, 1), edge(scene, 1, 5, 55), edge(scene, 1, 6, 40), edge(scene, 1, 7, 25)]
    assert all(one.verdict.is_link for one in edges)
    found = propose_pairs(edges, graph([]), 1)
    assert (0, 5) in found  # first choice of 0, and only choice of nobody else's before (5, 6)
    assert {pair for pair in found if pair[0] == 0} == {(0, 5), (0, 6), (0, 7)}  # 6 and 7 choose 0 themselves
    assert (6, 7) not in found


def test_parts_look_for_each_other_in_the_reserve(scene: Scene) -> None:
    edges = [*chain(scene, range(5)), *chain(scene, range(5, 8))]  # 0-1-2-3-4 and 5-6-7
    friends = {(0, 2), (1, 3), (2, 4), (5, 7)}
    across = [(0, 5), (1, 5), (2, 5), (2, 6), (3, 7)]
    reserve = graph([*across, (0, 4)], [0.1, 0.9, 0.5, 0.2, 0.3, 0.99])
    assert set(propose_pairs(edges, reserve, 1)) - friends == {
        (1, 5),
        (2, 5),
        (2, 6),
        (3, 7),
    }  # two for each of 5, 6, 7
    assert set(propose_pairs(edges, reserve, 2)) - friends == set(across)
    assert propose_pairs(edges, reserve, 2) == sorted(set(across) | friends)


def test_no_edges_at_all() -> None:
    reserve = graph([(0, 1), (2, 3)], num_images=4)
    assert propose_pairs([], reserve, 1) == [(0, 1), (2, 3)]


def matcher_of(scene: Scene) -> Matcher:
    model = Describer(scene, strangers=50)
    checker = PairChecker(model=model, encodings=model.encodings(), config=CONFIG, seed=0, threads=2)
    return Matcher(checker=checker, num_images=8, detect_sift=no_sift, friends=2)


def test_the_stage_matches_what_is_proposed_and_finds_it_again(scene: Scene, tmp_path: Path) -> None:
    first = graph([(image, image + 1) for image in range(7) if image != 3])  # 0-1-2-3 and 4-5-6-7
    reserve = graph([(0, 7), (3, 4), (2, 4)], [0.1, 0.9, 0.2])
    listener = Listener()
    cache = StageCache(tmp_path, "match", "key", listener)
    edges, resumed = matcher_of(scene).check_graph(first, cache, listener, reserve)
    pairs = [(one.first, one.second) for one in edges]
    friends = {(0, 2), (1, 3), (4, 6), (5, 7)}
    assert pairs == sorted({*map(tuple, first.pairs.tolist()), *friends, (0, 7), (2, 4), (3, 4)})
    assert resumed == 0
    assert [(name, total) for name, total, _ in listener.started] == [("match", 6), ("match more", 7)]
    assert all(one.verdict.is_link for one in edges)
    assert "7 more pairs" in listener.notes[0]

    again, resumed = matcher_of(scene).check_graph(first, cache, Listener(), reserve)
    assert resumed == 3  # both rounds, and what was settled
    assert [(one.first, one.second, len(one.xy_first)) for one in again] == [
        (one.first, one.second, len(one.xy_first)) for one in edges
    ]


def test_without_a_reserve_there_is_no_second_round(scene: Scene, tmp_path: Path) -> None:
    first = graph([(image, image + 1) for image in range(7)])
    for number, reserve in enumerate((None, graph([]))):
        cache = StageCache(tmp_path / str(number), "match", "key", Listener())
        edges, _ = matcher_of(scene).check_graph(first, cache, Listener(), reserve)
        assert len(edges) == 7
