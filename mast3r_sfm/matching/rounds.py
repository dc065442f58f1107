"""Rounds of pairs, matched chunk by chunk: a chunk's file is the unit of resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import minimum_spanning_tree

from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.matching.checker import Pair, PairChecker
from mast3r_sfm.matching.stored import pack_edges, unpack_edges
from mast3r_sfm.progress import Progress, steps
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.types import ViewGraph

PAIRS_PER_CHUNK = 64


@dataclass(kw_only=True)
class Budget:
    """So many seconds for matching, from now on."""

    seconds: float
    """0: as many as it takes."""
    clock: Callable[[], float] = time.monotonic
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def is_spent(self) -> bool:
        """Nothing new is to be begun."""
        return self.seconds > 0 and self.clock() - self._start >= self.seconds


@dataclass(kw_only=True)
class Rounds:
    """The edges of all rounds so far, and how they stand on disk."""

    checker: PairChecker
    cache: StageCache
    budget: Budget
    progress: Progress
    edges: list[EpipolarEdge] = field(default_factory=list)
    resumed: int = 0
    """Chunks that were found finished."""
    unmatched: int = 0
    """Pairs that were not matched because the budget was spent."""
    _chunks: int = 0

    def check(self, stage: str, pairs: Sequence[Pair]) -> None:
        """Match and check a round of pairs; what stands on disk is taken from there, whatever the budget."""
        with steps(self.progress, stage, len(pairs), "pair"):
            for start in range(0, len(pairs), PAIRS_PER_CHUNK):
                self._check_chunk(pairs[start : start + PAIRS_PER_CHUNK])

    def _check_chunk(self, pairs: Sequence[Pair]) -> None:
        edges = self.stored(pairs)
        if edges is None:
            edges = check_all(self.checker, pairs, self.budget, self.progress)
            self.unmatched += len(pairs) - len(edges)
            if len(edges) == len(pairs):
                self.store(edges)
        else:
            self.progress.advance(len(pairs))
        self._chunks += 1
        self.edges += edges

    def stored(self, pairs: Sequence[Pair]) -> list[EpipolarEdge] | None:
        """What stands on disk behind the chunks so far, where that holds these pairs."""
        stored = self.cache.read(self._chunks)
        if stored is None or [tuple(pair) for pair in stored[0]["pairs"].tolist()] != list(pairs):
            return None
        self.resumed += 1
        return unpack_edges(stored[0])

    def store(self, edges: list[EpipolarEdge]) -> None:
        """Write edges behind the chunks so far."""
        self.cache.write(self._chunks, pack_edges(edges))


def check_all(checker: PairChecker, pairs: Sequence[Pair], budget: Budget, progress: Progress) -> list[EpipolarEdge]:
    """One edge per pair, in their order; of the pairs that came too late for the budget, none."""
    found: dict[Pair, EpipolarEdge] = {}
    with closing(checker.check([] if budget.is_spent else pairs)) as results:
        for some in results:
            found.update({(edge.first, edge.second): edge for edge in some})
            progress.advance(len(some))
            if budget.is_spent:
                break
    return [found[pair] for pair in pairs if pair in found]


def most_important_first(graph: ViewGraph) -> list[Pair]:
    """The pairs that hold all images together by their most similar ones, then the others, most similar first."""
    first, second = graph.pairs.T.astype(np.int64)
    # Similarities are below 1, and the solver takes a cost of 0 for no pair.
    cost = scipy.sparse.csr_array((2.0 - graph.score, (first, second)), shape=(graph.num_images,) * 2)
    tree = minimum_spanning_tree(cost).tocoo()
    in_tree = np.isin(first * graph.num_images + second, tree.coords[0] * graph.num_images + tree.coords[1])
    order = np.lexsort((-graph.score, ~in_tree))
    return [(int(first[number]), int(second[number])) for number in order]
