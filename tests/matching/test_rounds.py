"""A time budget: what comes first, what is left out and said, and how a later run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.matching import checker as checker_module
from mast3r_sfm.matching import rounds, stage
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.rounds import Budget, Rounds, most_important_first
from mast3r_sfm.matching.stage import Matcher
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.types import Reason, ViewGraph
from tests.exact import Describer, Listener, Scene, all_pairs, keypoint_source, no_sift, ring

NUMBER = 6
PAIRS = [(int(i), int(j)) for i, j in all_pairs(NUMBER).pairs]


@pytest.fixture(scope="module")
def scene() -> Scene:
    return ring(NUMBER, turn_deg=60, points=150)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "PAIRS_PER_CHUNK", 4)


def make_checker(scene: Scene, budget_min: float = 0.0) -> PairChecker:
    model = Describer(scene, strangers=50)
    config = MatchConfig(features="model", time_budget_min=budget_min)
    return PairChecker(model=model, encodings=model.encodings(), config=config, seed=0, threads=1)


def with_sources(checker: PairChecker) -> PairChecker:
    return replace(checker, sources=[keypoint_source(checker.encodings)])


def make_rounds(scene: Scene, cache: StageCache, budget: Budget) -> Rounds:
    checker = with_sources(make_checker(scene))
    return Rounds(checker=checker, cache=cache, budget=budget, progress=Listener())


def ticking(limit: int) -> Budget:
    """A budget that is spent after it was asked `limit` times."""
    ticks: Iterator[int] = count()
    return Budget(seconds=limit, clock=lambda: float(next(ticks)))


def test_what_holds_all_together_comes_first_then_the_most_similar() -> None:
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    score = [0.9, 0.8, 0.1, 0.85, 0.0, 0.05]
    graph = ViewGraph(
        num_images=4,
        pairs=np.array(pairs, np.int32),
        score=np.array(score, np.float32),
        reason=np.full(6, Reason.EXHAUSTIVE, np.int32),
    )
    assert most_important_first(graph) == [(0, 1), (1, 2), (0, 3), (0, 2), (2, 3), (1, 3)]


def test_no_budget_is_never_spent() -> None:
    assert not Budget(seconds=0, clock=lambda: 1e9).is_spent


def test_a_spent_budget_leaves_pairs_out_and_stores_whole_chunks_only(scene: Scene, tmp_path: Path) -> None:
    cache = StageCache(tmp_path, "match", "key", Listener())
    some = make_rounds(scene, cache, ticking(8))
    some.check("match", PAIRS)
    assert 4 < len(some.edges) < 15
    assert some.unmatched == 15 - len(some.edges)
    assert [(one.first, one.second) for one in some.edges] == PAIRS[: len(some.edges)]
    assert sum(1 for _ in cache.folder.glob("*.safetensors")) == len(some.edges) // 4

    rest = make_rounds(scene, cache, Budget(seconds=0))
    rest.check("match", PAIRS)
    assert [(one.first, one.second) for one in rest.edges] == PAIRS
    assert rest.unmatched == 0
    assert rest.resumed == len(some.edges) // 4


def test_what_stands_on_disk_costs_no_budget(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StageCache(tmp_path, "match", "key", Listener())
    whole = make_rounds(scene, cache, Budget(seconds=0))
    whole.check("match", PAIRS)
    monkeypatch.setattr(checker_module, "check_pair", None)  # any work would fail
    spent = make_rounds(scene, cache, ticking(1))
    spent.check("match", PAIRS)
    assert len(spent.edges) == 15
    assert (spent.unmatched, spent.resumed) == (0, 4)


def test_chunks_of_other_pairs_are_not_taken(scene: Scene, tmp_path: Path) -> None:
    cache = StageCache(tmp_path, "match", "key", Listener())
    for pairs in (PAIRS[:4], PAIRS[4:8]):
        one = make_rounds(scene, cache, Budget(seconds=0))
        one.check("match", pairs)
        assert [(edge.first, edge.second) for edge in one.edges] == pairs
        assert one.resumed == 0


def test_the_stage_says_what_it_left_out(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "Budget", lambda seconds: ticking(int(seconds)))
    listener = Listener()
    checker = make_checker(scene, budget_min=0.15)  # nine questions
    matcher = Matcher(checker=checker, num_images=NUMBER, detect_sift=no_sift)
    cache = StageCache(tmp_path, "match", "key", listener)
    edges, _ = matcher.check_graph(all_pairs(NUMBER), cache, listener)
    assert 0 < len(edges) < 15
    (warning,) = listener.warnings
    assert f"0.15 minutes was spent: {15 - len(edges)} of 15 pairs were not matched" in warning
    assert edges == sorted(edges, key=lambda edge: (edge.first, edge.second))
