"""The view graph: invariants for any similarity, and small cases by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.errors import ShapeError
from mast3r_sfm.retrieval.graph import (
    connected,
    exhaustive_graph,
    farthest_keyframes,
    graph_of_pairs,
    most_pairs,
    retrieval_graph,
    view_graph,
)
from mast3r_sfm.types import Reason, ViewGraph

PLACES = np.array([[1, 0.8, 0.1, 0.2], [0.8, 1, 0.15, 0.1], [0.1, 0.15, 1, 0.7], [0.2, 0.1, 0.7, 1]], np.float32)


def _similarity(seed: int, count: int, ties: bool = False) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = generator.random((count, count)).astype(np.float32)
    values = (np.round(values * 3) / 3 if ties else values).astype(np.float32)
    values = (values + values.T) / 2
    np.fill_diagonal(values, 1)
    return values


def _pairs(graph: ViewGraph) -> set[tuple[int, int]]:
    return {(i, j) for i, j in graph.pairs.tolist()}


def _components(graph: ViewGraph) -> int:
    shape = (graph.num_images, graph.num_images)
    edges = coo_array((np.ones(len(graph.pairs)), tuple(graph.pairs.T)), shape=shape)
    return int(connected_components(edges, directed=False)[0])


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(2, 30),
    keyframes=st.integers(1, 35),
    neighbours=st.integers(1, 35),
    ties=st.booleans(),
)
def test_invariants(seed: int, count: int, keyframes: int, neighbours: int, ties: bool) -> None:
    similarity = _similarity(seed, count, ties)
    config = PairsConfig(keyframes=keyframes, neighbours=neighbours)
    graph = retrieval_graph(similarity, keyframes=keyframes, neighbours=neighbours)
    pairs = _pairs(graph)
    assert graph.num_images == count
    assert _components(graph) == 1
    assert count - 1 <= len(pairs) <= min(most_pairs(count, config), count * (count - 1) // 2)
    assert not (graph.reason == Reason.BRIDGE).any()
    np.testing.assert_allclose(graph.score, similarity[tuple(graph.pairs.T)])

    chosen = farthest_keyframes(similarity, keyframes)
    assert len(set(chosen.tolist())) == len(chosen) == min(keyframes, count)
    assert {(int(min(a, b)), int(max(a, b))) for a in chosen for b in chosen if a != b} <= pairs
    for image in range(count):
        partners = [j for i, j in pairs if i == image] + [i for i, j in pairs if j == image]
        assert len(partners) >= min(neighbours, count - 1)
        missed = [similarity[image, j] for j in range(count) if j != image and j not in partners]
        nearest = np.sort(np.delete(similarity[image], image))[::-1][: min(neighbours, count - 1)]
        assert not missed or max(missed) <= nearest.min()
    again = retrieval_graph(similarity.copy(), keyframes=keyframes, neighbours=neighbours)
    for name in ("pairs", "score", "reason"):
        np.testing.assert_array_equal(getattr(again, name), getattr(graph, name))


@given(seed=st.integers(0, 10_000), count=st.integers(2, 20))
def test_the_order_of_the_images_does_not_matter(seed: int, count: int) -> None:
    similarity = _similarity(seed, count)
    order = np.random.default_rng(seed).permutation(count)
    graph = retrieval_graph(similarity, keyframes=4, neighbours=3)
    shuffled = retrieval_graph(similarity[np.ix_(order, order)], keyframes=4, neighbours=3)
    renamed = {(int(min(a, b)), int(max(a, b))) for a, b in order[shuffled.pairs]}
    assert renamed == _pairs(graph)


def test_keyframes_by_hand() -> None:
    # Image 1 shares most with the others; image 3 is farthest from it; image 2 is farther from both than image 0.
    similarity = PLACES.copy()
    similarity[0, 1] = similarity[1, 0] = 0.95
    similarity[1, 2] = similarity[2, 1] = 0.5
    assert farthest_keyframes(similarity, 9).tolist() == [1, 3, 2, 0]
    assert farthest_keyframes(similarity, 2, start=0).tolist() == [0, 2]


def test_reasons_by_hand() -> None:
    graph = retrieval_graph(PLACES, keyframes=2, neighbours=1, start=0)
    assert graph.pairs.tolist() == [[0, 1], [0, 2], [2, 3]]
    assert graph.reason.tolist() == [Reason.NEAREST, Reason.KEYFRAME, Reason.NEAREST]
    graph = retrieval_graph(PLACES, keyframes=1, neighbours=2, start=0)
    assert graph.pairs.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [2, 3]]
    assert graph.reason.tolist() == [Reason.NEAREST] * 3 + [Reason.NEIGHBOUR] * 2


def test_what_is_near_an_image_stands_in_its_row() -> None:
    similarity = np.array([[1, 0.1, 0.2], [0.1, 1, 0.6], [0.5, 0.3, 1]], np.float32)
    graph = retrieval_graph(similarity, keyframes=2, neighbours=1, start=0)
    assert graph.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert graph.reason.tolist() == [Reason.KEYFRAME, Reason.NEAREST, Reason.NEIGHBOUR]
    np.testing.assert_allclose(graph.score, [0.1, 0.35, 0.45])


def test_bridges_by_hand() -> None:
    parts = ViewGraph(
        num_images=4,
        pairs=np.array([[0, 1], [2, 3]], np.int32),
        score=np.array([0.8, 0.7], np.float32),
        reason=np.full(2, Reason.USER, np.int32),
    )
    graph = connected(parts, PLACES)
    assert graph.pairs.tolist() == [[0, 1], [0, 3], [2, 3]]
    assert graph.reason.tolist() == [Reason.USER, Reason.BRIDGE, Reason.USER]
    np.testing.assert_allclose(graph.score, [0.8, 0.2, 0.7])
    assert connected(graph, PLACES) is graph


def test_of_equal_bridges_those_of_the_first_images_are_taken() -> None:
    parts = graph_of_pairs(np.eye(6), np.array([[2, 4]]), Reason.USER)
    graph = connected(parts, np.eye(6))
    assert graph.pairs[graph.reason == Reason.BRIDGE].tolist() == [[0, 1], [0, 2], [0, 3], [0, 5]]


@given(seed=st.integers(0, 10_000), count=st.integers(1, 15), edges=st.integers(0, 12), ties=st.booleans())
def test_bridges_are_few_and_the_most_similar(seed: int, count: int, edges: int, ties: bool) -> None:
    similarity = _similarity(seed, count, ties)
    every = exhaustive_graph(similarity)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(every.pairs))[:edges])
    parts = ViewGraph(
        num_images=count, pairs=every.pairs[chosen], score=every.score[chosen], reason=every.reason[chosen]
    )
    graph = connected(parts, similarity)
    bridges = graph.reason == Reason.BRIDGE
    assert _components(graph) == 1
    assert bridges.sum() == _components(parts) - 1
    assert _pairs(parts) == {(i, j) for i, j in graph.pairs[~bridges].tolist()}
    # A maximum spanning tree that gets the edges of the parts for nothing costs as much as the bridges.
    cost = 2 - similarity.astype(float)
    cost[tuple(parts.pairs.T)] = 1e-6
    tree = minimum_spanning_tree(np.triu(cost, k=1)).toarray()
    np.testing.assert_allclose(tree[tree > 0.5].sum(), (2 - graph.score[bridges]).sum(), atol=1e-4)


@pytest.mark.parametrize(("count", "exhaustive"), [(2, True), (20, True), (24, True), (25, False), (60, False)])
def test_all_pairs_where_that_is_no_more_work(count: int, exhaustive: bool) -> None:
    graph = view_graph(_similarity(0, count), PairsConfig())
    everything = count * (count - 1) // 2
    assert (len(graph.pairs) == everything) == exhaustive
    assert set(graph.reason.tolist()) == ({Reason.EXHAUSTIVE} if exhaustive else {0, 1, 2})
    if not exhaustive:
        assert len(graph.pairs) < everything


@pytest.mark.parametrize("count", [0, 1])
def test_no_images_no_pairs(count: int) -> None:
    for graph in (
        view_graph(np.eye(count, dtype=np.float32), PairsConfig()),
        retrieval_graph(np.eye(count, dtype=np.float32), keyframes=3, neighbours=2),
    ):
        assert graph.num_images == count
        assert len(graph.pairs) == 0


def test_wrong_similarities_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[N, N\]"):
        exhaustive_graph(np.zeros((2, 3), np.float32))
    with pytest.raises(ShapeError, match="NaN"):
        retrieval_graph(np.full((3, 3), np.nan, np.float32), keyframes=1, neighbours=1)
    with pytest.raises(ShapeError, match="graph of 4"):
        connected(exhaustive_graph(PLACES), PLACES[:3, :3])
