"""The view graph: from the similarity of images to the pairs worth matching.

Source: Duisterhof et al., "MASt3R-SfM", arXiv 2409.19152, section 4.1, with an image not counted as its own neighbour
and with a start of the farthest-point sampling that is not random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.errors import ShapeError
from mast3r_sfm.retrieval.bridges import find_bridges
from mast3r_sfm.retrieval.further import further_pairs
from mast3r_sfm.retrieval.similarity import Similarity, as_similarity
from mast3r_sfm.types import Int32, Int64, Reason, ViewGraph

Matrix = NDArray[np.floating[Any]]


def view_graph(similarity: Similarity | Matrix, config: PairsConfig) -> ViewGraph:
    """All pairs where that is no more work than the retrieval's graph can be, otherwise the retrieval's graph.

    Args:
        similarity: of N images, or a matrix [N, N] in [0, 1] whose row i holds the similarity of image i to the others.
        config: number of keyframes and neighbours.
    """
    similarity = as_similarity(similarity)
    count = len(similarity)
    if count * (count - 1) // 2 <= most_pairs(count, config):
        return exhaustive_graph(similarity)
    return retrieval_graph(similarity, keyframes=config.keyframes_of(count), neighbours=config.neighbours)


def most_pairs(num_images: int, config: PairsConfig) -> int:
    """Pairs of the retrieval's graph if none were found twice.

    A bound that needs no similarity, so that small collections are matched exhaustively whatever they show.
    """
    keyframes = min(config.keyframes_of(num_images), num_images)
    neighbours = min(config.neighbours, max(num_images - 1, 0))
    return keyframes * (keyframes - 1) // 2 + (num_images - keyframes) + num_images * neighbours


def exhaustive_graph(similarity: Similarity | Matrix) -> ViewGraph:
    """Every pair of the N images."""
    similarity = as_similarity(similarity)
    first, second = np.triu_indices(len(similarity), k=1)
    return _graph(similarity, np.stack([first, second], axis=1), np.full(len(first), Reason.EXHAUSTIVE))


def retrieval_graph(
    similarity: Similarity | Matrix, *, keyframes: int, neighbours: int, start: int | None = None
) -> ViewGraph:
    """Keyframes with each other, every other image with its nearest keyframe, every image with its nearest images.

    A pair found in several ways carries the first of these reasons. The graph is connected.

    Args:
        similarity: of N images, or a matrix [N, N] in [0, 1] whose row i holds the similarity of image i to the
            others. The diagonal is not read.
        keyframes: number of keyframes, at least 1; capped at N.
        neighbours: nearest images of every image, itself not counted; capped at N − 1.
        start: the first keyframe, as for `farthest_keyframes`.

    Returns:
        The graph; the score of a pair is the mean of both directions.
    """
    similarity = as_similarity(similarity)
    count = len(similarity)
    if count < 2:
        return exhaustive_graph(similarity)
    chosen = farthest_keyframes(similarity, keyframes, start=start)
    first, second = np.triu_indices(len(chosen), k=1)
    among = np.stack([chosen[first], chosen[second]], axis=1)
    others = np.setdiff1d(np.arange(count), chosen)
    to_keyframe = np.stack([others, chosen[similarity.columns(chosen)[:, others].argmax(axis=0)]], axis=1)
    near = similarity.nearest(neighbours).image
    to_near = np.stack([np.repeat(np.arange(count), near.shape[1]), near.ravel()], axis=1)
    sizes = [len(among), len(to_keyframe), len(to_near)]
    reason = np.repeat([Reason.KEYFRAME, Reason.NEAREST, Reason.NEIGHBOUR], sizes)
    return connected(_graph(similarity, np.concatenate([among, to_keyframe, to_near]), reason), similarity)


def farthest_keyframes(similarity: Similarity | Matrix, count: int, *, start: int | None = None) -> Int64:
    """Farthest-point sampling: each next keyframe is the image least similar to all that were picked.

    Args:
        similarity: of N images; the rows of picked images are read.
        count: at least 1; capped at N, which is at least 1.
        start: the first keyframe; by default the image with the largest total similarity to the others, the heart of
            the collection. Of equals, the first is taken, here and later.

    Returns:
        [min(count, N)] images in the order they were picked.
    """
    similarity = as_similarity(similarity)
    chosen = [int(similarity.totals().argmax()) if start is None else start]
    closest = similarity.rows(np.array(chosen))[0]
    while len(chosen) < min(count, len(similarity)):
        # A picked image may look far from itself where similarities are small: it must not be picked again.
        closest[chosen] = np.inf
        chosen.append(int(closest.argmin()))
        closest = np.maximum(closest, similarity.rows(np.array(chosen[-1:]))[0])
    return np.array(chosen)


def graph_of_pairs(similarity: Similarity | Matrix, pairs: Int64, reason: Reason) -> ViewGraph:
    """The graph of given pairs [P, 2], in any order and orientation, each as often as it may be.

    Args:
        similarity: of N images.
        pairs: of two different images each.
        reason: of all of them.
    """
    return _graph(as_similarity(similarity), pairs, np.full(len(pairs), reason))


def union(graphs: Sequence[ViewGraph]) -> ViewGraph:
    """All pairs of several graphs over the same images; of a pair in several of them, the lowest reason stays."""
    num_images = graphs[0].num_images
    pairs = np.concatenate([graph.pairs for graph in graphs]).astype(np.int64)
    reason = np.concatenate([graph.reason for graph in graphs])
    order = np.lexsort((reason, pairs[:, 1], pairs[:, 0]))
    kept = order[np.unique(pairs[order] @ [num_images, 1], return_index=True)[1]]
    return ViewGraph(
        num_images=num_images,
        pairs=pairs[kept].astype(np.int32),
        score=np.concatenate([graph.score for graph in graphs])[kept],
        reason=reason[kept],
    )


def reserve(similarity: Similarity | Matrix, graph: ViewGraph, count: int) -> ViewGraph:
    """The pairs worth matching next: of every image with the `count` most similar ones that `graph` leaves out."""
    similarity = as_similarity(similarity)
    return graph_of_pairs(similarity, further_pairs(similarity, graph, count), Reason.SECOND_ROUND)


def connected(graph: ViewGraph, similarity: Similarity | Matrix) -> ViewGraph:
    """Join the components of a graph, each time by the most similar pair between two, marked as a bridge.

    Args:
        graph: any graph over N images.
        similarity: of N images; a pair counts with the mean of both directions.

    Returns:
        The graph itself where it is connected, otherwise one with as few more pairs as can be.
    """
    similarity = as_similarity(similarity)
    if len(similarity) != graph.num_images:
        raise ShapeError(f"similarity of {len(similarity)} images for a graph of {graph.num_images}")
    added = find_bridges(similarity, _labels(graph))
    return union([graph, graph_of_pairs(similarity, added, Reason.BRIDGE)]) if len(added) else graph


def _labels(graph: ViewGraph) -> Int32:
    shape = (graph.num_images, graph.num_images)
    edges = scipy.sparse.coo_array((np.ones(len(graph.pairs), bool), tuple(graph.pairs.T)), shape=shape)
    label: Int32 = connected_components(edges, directed=False)[1]
    return label


def _graph(similarity: Similarity, pairs: NDArray[np.integer], reason: NDArray[np.integer]) -> ViewGraph:
    """Canonical, sorted and unique pairs; of one found twice, the lowest reason stays."""
    low, high = pairs.min(axis=1).astype(np.int64), pairs.max(axis=1).astype(np.int64)
    order = np.lexsort((reason, high, low))
    kept = order[np.unique(low[order] * len(similarity) + high[order], return_index=True)[1]]
    unique = np.stack([low[kept], high[kept]], axis=1)
    return ViewGraph(
        num_images=len(similarity),
        pairs=unique.astype(np.int32),
        score=np.clip(similarity.scores(unique), 0, 1),
        reason=reason[kept].astype(np.int32),
    )
