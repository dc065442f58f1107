"""Similarity that is computed as it is asked for is, to the bit, the one that is there as a matrix."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.errors import ShapeError
from mast3r_sfm.retrieval import coded, further, postings, similarity
from mast3r_sfm.retrieval.asmk import describe, invert, score
from mast3r_sfm.retrieval.coded import CodedImages
from mast3r_sfm.retrieval.graph import (
    connected,
    exhaustive_graph,
    farthest_keyframes,
    reserve,
    retrieval_graph,
    view_graph,
)
from mast3r_sfm.retrieval.nearest import RunningNearest, sortable, unsorted
from mast3r_sfm.retrieval.postings import PostingsBuilder
from mast3r_sfm.retrieval.similarity import DenseSimilarity, StreamedSimilarity, shown_matrix
from mast3r_sfm.types import Reason, ViewGraph

WORDS = 12


def _coded(seed: int, images: int, dimension: int = 32, most_tokens: int = 12, threads: int = 1) -> CodedImages:
    """Few tokens, so that scores are tied; some images show nothing, and word 0 is seen by one at most."""
    generator = np.random.default_rng(seed)
    image = np.repeat(np.arange(images, dtype=np.int32), generator.integers(0, most_tokens, images))
    tokens = generator.integers(-1, 2, (len(image), dimension)).astype(np.float32)
    centroids = 0.5 * generator.standard_normal((WORDS, dimension)).astype(np.float32)
    words = 1 + np.argsort(generator.random((len(image), WORDS - 1)), axis=1)[:, :3].astype(np.int32)
    words[:1, 0] = 0
    database, query = (describe(tokens, image, words[:, :many], centroids, images) for many in (1, 3))
    return CodedImages(database=invert(database, WORDS), query=invert(query, WORDS), threads=threads)


def _matrix(images: CodedImages) -> np.ndarray:
    return images.rows(np.arange(len(images)))


def _assert_same(found: ViewGraph, expected: ViewGraph) -> None:
    for name in ("num_images", "pairs", "score", "reason"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def _make_blocks_small(patch: pytest.MonkeyPatch) -> None:
    """One row, and a few pairs of codes, at a time."""
    patch.setattr(coded, "_CELLS_AT_ONCE", 40)
    patch.setattr(postings, "_PAIRS_AT_ONCE", 5)
    patch.setattr(postings, "_SHORT", 4)
    patch.setattr(similarity, "_PAIRS_AT_ONCE", 7)
    patch.setattr(similarity, "_ROWS_AT_ONCE", 3)


@given(
    seed=st.integers(0, 10_000), images=st.integers(0, 25), keyframes=st.integers(1, 8), neighbours=st.integers(1, 8)
)
def test_the_graph_is_that_of_the_matrix(seed: int, images: int, keyframes: int, neighbours: int) -> None:
    collection = _coded(seed, images)
    matrix = _matrix(collection)
    for kept in (0, neighbours, 100):
        streamed = StreamedSimilarity(collection, kept=kept)
        np.testing.assert_array_equal(streamed.totals(), DenseSimilarity(matrix).totals())
        graph = retrieval_graph(streamed, keyframes=keyframes, neighbours=neighbours)
        _assert_same(graph, retrieval_graph(matrix, keyframes=keyframes, neighbours=neighbours))
    config = PairsConfig(keyframes=keyframes, neighbours=neighbours)
    _assert_same(view_graph(streamed, config), view_graph(matrix, config))


@given(seed=st.integers(0, 10_000), images=st.integers(1, 25), edges=st.integers(0, 20))
def test_the_bridges_are_those_of_the_matrix(seed: int, images: int, edges: int) -> None:
    collection = _coded(seed, images)
    every = exhaustive_graph(_matrix(collection))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(every.pairs))[:edges])
    parts = ViewGraph(
        num_images=images, pairs=every.pairs[chosen], score=every.score[chosen], reason=every.reason[chosen]
    )
    graph = connected(parts, StreamedSimilarity(collection, kept=2))
    _assert_same(graph, connected(parts, _matrix(collection)))


@given(seed=st.integers(0, 10_000), images=st.integers(1, 25), count=st.integers(0, 30))
def test_nearest_images_are_sorted_by_score_then_number(seed: int, images: int, count: int) -> None:
    collection = _coded(seed, images)
    matrix = _matrix(collection).astype(np.float64)
    np.fill_diagonal(matrix, -1)
    expected = np.argsort(-matrix, axis=1, kind="stable")[:, : min(count, images - 1)]
    for found in (DenseSimilarity(_matrix(collection)), StreamedSimilarity(collection, kept=3)):
        nearest = found.nearest(count)
        np.testing.assert_array_equal(nearest.image, expected)
        np.testing.assert_array_equal(nearest.score, np.take_along_axis(matrix, expected, axis=1).astype(np.float32))


@given(seed=st.integers(0, 10_000), images=st.integers(1, 20))
def test_the_matrix_is_the_mean_of_both_directions(seed: int, images: int) -> None:
    generator = np.random.default_rng(seed)
    image = np.repeat(np.arange(images, dtype=np.int32), generator.integers(0, 9, images))
    tokens, centroids = (generator.standard_normal((n, 64)).astype(np.float32) for n in (len(image), WORDS))
    words = np.argsort(generator.random((len(image), WORDS)), axis=1)[:, :4].astype(np.int32)
    database, query = (describe(tokens, image, words[:, :many], centroids, images) for many in (1, 4))
    matrix = _matrix(CodedImages(database=invert(database, WORDS), query=invert(query, WORDS)))
    directed = score(query, database)
    expected = (directed + directed.T) / 2
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(matrix, expected, atol=1e-7)
    np.testing.assert_array_equal(matrix, matrix.T)
    assert matrix.min() >= 0
    assert matrix.max() <= 1


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dimension", [20, 64, 1024])
def test_neither_blocks_nor_threads_change_a_bit(threads: int, dimension: int) -> None:
    some = np.array([7, 3, 3, 39])
    parts = _coded(3, 40, dimension, threads=threads)
    with pytest.MonkeyPatch.context() as patch:
        _make_blocks_small(patch)
        assert parts.rows_at_once == 1
        pieces = StreamedSimilarity(parts, kept=4)
        blocks = list(parts.lower_blocks())
        rows, graph = pieces.rows(some), retrieval_graph(pieces, keyframes=5, neighbours=6)
    assert [first for first, _ in blocks] == list(range(40))

    collection = _coded(3, 40, dimension)
    assert collection.rows_at_once == 256
    matrix = _matrix(collection)
    for first, block in blocks:
        np.testing.assert_array_equal(block, matrix[first : first + 1, : first + 1])
    np.testing.assert_array_equal(rows, matrix[some])
    _assert_same(graph, retrieval_graph(matrix, keyframes=5, neighbours=6))
    assert len(np.unique(matrix)) > 100


@given(seed=st.integers(0, 10_000), images=st.integers(2, 20))
def test_scores_of_any_pairs(seed: int, images: int) -> None:
    collection = _coded(seed, images)
    pairs = np.random.default_rng(seed).integers(0, images, (30, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    expected = _matrix(collection)[tuple(pairs.T)]
    for kept in (0, 2, 100):
        np.testing.assert_array_equal(StreamedSimilarity(collection, kept=kept).scores(pairs), expected)
    assert len(StreamedSimilarity(collection).scores(pairs[:0])) == 0


def test_rows_and_columns_of_a_matrix_that_is_not_symmetric() -> None:
    values = np.array([[1, 0.5, 0.25], [0, 1, 0.75], [0.125, 0.25, 1]], np.float32)
    found = DenseSimilarity(values)
    np.testing.assert_array_equal(found.rows(np.array([1])), [[0, 1, 0.75]])
    np.testing.assert_array_equal(found.columns(np.array([1])), [[0.5, 1, 0.25]])
    np.testing.assert_array_equal(found.mutual(np.array([1])), [[0.25, 1, 0.5]])
    np.testing.assert_array_equal(found.scores(np.array([[0, 1], [2, 0]])), [0.25, 0.1875])
    np.testing.assert_array_equal(found.totals(), [0.4375, 0.75, 0.6875])
    np.testing.assert_array_equal(found.nearest(1).image, [[1], [2], [1]])
    np.testing.assert_array_equal(found.nearest(9).score, [[0.5, 0.25], [0.75, 0], [0.25, 0.125]])


def test_totals_are_exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((200, 200)).astype(np.float32) ** 8
    whole = DenseSimilarity(values).totals()
    exact = (values.sum(axis=0, dtype=np.float64) + values.sum(axis=1, dtype=np.float64)) / 2 - values.diagonal()
    np.testing.assert_allclose(whole, exact, rtol=0, atol=200 * 2.0**-31)
    for rows in (1, 7):
        monkeypatch.setattr(similarity, "_ROWS_AT_ONCE", rows)
        np.testing.assert_array_equal(DenseSimilarity(values).totals(), whole)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20))
def test_sortable_numbers(values: list[float]) -> None:
    given_values = np.array(values, np.float32)
    keys = sortable(given_values, np.arange(len(values)))
    np.testing.assert_array_equal(np.argsort(-keys), np.argsort(-given_values, kind="stable"))
    value, index = unsorted(keys)
    np.testing.assert_array_equal(value, given_values)
    np.testing.assert_array_equal(index, np.arange(len(values)))


def test_parts_of_the_matrix_may_come_in_any_order() -> None:
    values = np.random.default_rng(0).integers(0, 4, (12, 12)).astype(np.float32)
    expected = DenseSimilarity(values).nearest(5)
    found = RunningNearest(12, 5)
    for row in (8, 0, 4):
        for column in (6, 0):
            rows, columns = slice(row, row + 4), slice(column, column + 6)
            found.add(rows, columns, values[rows, columns])
    np.testing.assert_array_equal(found.result().image, expected.image)
    np.testing.assert_array_equal(found.result().score, expected.score)


def test_each_score_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    collection = _coded(1, 60, 64)
    monkeypatch.setattr(coded, "_CELLS_AT_ONCE", 600)
    computed = np.zeros((60, 60), int)
    block = CodedImages._block

    def counted(self: CodedImages, part: tuple[np.ndarray, np.ndarray, np.ndarray, int]) -> np.ndarray:
        computed[np.ix_(part[0], np.arange(part[3]))] += 1
        return block(self, part)

    monkeypatch.setattr(CodedImages, "_block", counted)
    StreamedSimilarity(collection, kept=5)
    assert (np.tril(computed) == np.tri(60, dtype=int)).all()
    assert computed.sum() == sum(10 * 10 * blocks for blocks in range(1, 7))


def test_memory_is_that_of_a_few_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    images, rows = 2000, 10
    monkeypatch.setattr(coded, "_CELLS_AT_ONCE", images * rows)
    collection = _coded(0, images, most_tokens=4)
    assert collection.rows_at_once == rows
    tracemalloc.start()
    streamed = StreamedSimilarity(collection, kept=20)
    graph = retrieval_graph(streamed, keyframes=20, neighbours=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Half the matrix in single precision, which would be the least to hold.
    assert peak < images * images * 4 / 2
    assert len(graph.pairs) > images


def test_bridges_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    collection = _coded(4, 50)
    nothing = ViewGraph(
        num_images=50, pairs=np.zeros((0, 2), np.int32), score=np.zeros(0, np.float32), reason=np.zeros(0, np.int32)
    )
    whole = connected(nothing, StreamedSimilarity(collection))
    monkeypatch.setattr("mast3r_sfm.retrieval.bridges._CELLS_AT_ONCE", 170)
    _assert_same(connected(nothing, StreamedSimilarity(collection)), whole)
    assert set(whole.reason.tolist()) == {Reason.BRIDGE}
    assert len(whole.pairs) == 49


@pytest.mark.parametrize(("largest", "shown"), [(30, range(30)), (29, [0, 5, 10, 14, 19, 24, 29])])
def test_what_is_shown_is_bounded(monkeypatch: pytest.MonkeyPatch, largest: int, shown: Sequence[int]) -> None:
    monkeypatch.setattr(similarity, "LARGEST_MATRIX", largest)
    monkeypatch.setattr(similarity, "SHOWN", 7)
    collection = _coded(2, 30)
    matrix = shown_matrix(StreamedSimilarity(collection))
    np.testing.assert_array_equal(matrix, _matrix(collection)[np.ix_(shown, shown)])


@given(seed=st.integers(0, 10_000), images=st.integers(1, 25), edges=st.integers(0, 300), count=st.integers(0, 8))
def test_the_reserve_holds_the_most_similar_pairs_that_are_left(seed: int, images: int, edges: int, count: int) -> None:
    collection = _coded(seed, images)
    matrix = _matrix(collection)
    every = exhaustive_graph(matrix)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(every.pairs))[:edges])
    graph = ViewGraph(
        num_images=images, pairs=every.pairs[chosen], score=every.score[chosen], reason=every.reason[chosen]
    )
    taken = {(i, j) for i, j in graph.pairs.tolist()}
    expected = set()
    for image in range(images):
        order = np.argsort(-matrix[image], kind="stable").tolist()
        left = [pair for j in order if j != image and (pair := (min(image, j), max(image, j))) not in taken]
        expected |= set(left[:count])
    for kept in (2, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(further, "NEAREST_KEPT", kept)
            patch.setattr(further, "_CELLS_AT_ONCE", 3 * images)
            found = reserve(StreamedSimilarity(collection, kept=kept), graph, count)
        assert {(i, j) for i, j in found.pairs.tolist()} == expected
        np.testing.assert_array_equal(found.score, matrix[tuple(found.pairs.T)])
        assert set(found.reason.tolist()) <= {Reason.SECOND_ROUND}


def test_codes_of_another_length_are_refused() -> None:
    nothing = np.zeros(0, np.int32)
    builder = PostingsBuilder(4)
    builder.add(1, nothing, nothing, np.zeros((0, 2), np.uint32))
    with pytest.raises(ShapeError, match="codes of 32 bits after codes of 64"):
        builder.add(1, nothing, nothing, np.zeros((0, 1), np.uint32))


@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 20), max_size=4), width=st.integers(0, 3))
def test_an_inverted_file_of_parts_is_that_of_the_whole(seed: int, cuts: list[int], width: int) -> None:
    generator = np.random.default_rng(seed)
    seen = generator.random((20, 7)) < 0.3
    image, word = (part.astype(np.int32) for part in np.nonzero(seen))
    code = generator.integers(0, 2**32, (len(image), width), dtype=np.uint32)
    builder = PostingsBuilder(7)
    bounds = [0, *sorted(cuts), 20]
    for low, high in pairwise(bounds):
        part = (image >= low) & (image < high)
        builder.add(high - low, image[part] - low, word[part], code[part])
    found = builder.build()
    assert found.num_images == 20
    assert found.bits == 32 * width
    np.testing.assert_array_equal(found.entries_per_image(), seen.sum(axis=1))
    np.testing.assert_array_equal(np.diff(found.start), seen.sum(axis=0))
    listed_image = np.nonzero(seen.T)[1]
    np.testing.assert_array_equal(found.image, listed_image)
    some = np.array([3, 0, 3, 19])
    entries = found.entries(some)
    expected = [np.flatnonzero(image == number) for number in some]
    np.testing.assert_array_equal(entries.image, np.repeat(np.arange(4), [len(part) for part in expected]))
    np.testing.assert_array_equal(entries.word, word[np.concatenate(expected)])
    whole = np.stack(entries.code, axis=1).view(np.uint32) if width else code[:0]
    np.testing.assert_array_equal(whole, code[np.concatenate(expected)] if width else code[:0])


def test_keyframes_of_a_collection_that_is_streamed() -> None:
    collection = _coded(8, 30)
    found = farthest_keyframes(StreamedSimilarity(collection), 40)
    assert sorted(found.tolist()) == list(range(30))
    np.testing.assert_array_equal(found, farthest_keyframes(_matrix(collection), 40))
