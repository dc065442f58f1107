"""The view graph: from the similarity of images to the pairs worth matching.

Source: Duisterhof et al., "MASt3R-SfM", arXiv 2409.19152, section 4.1, with an image not counted as its own neighbour
and with a start of the farthest-point sampling that is not random.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Float32, Int32, Int64, Reason, ViewGraph


def view_graph(similarity: Float32, config: PairsConfig) -> ViewGraph:
    """All pairs where that is no more work than the retrieval's graph can be, otherwise the retrieval's graph.

    Args:
        similarity: [N, N] in [0, 1]; row i holds the similarity of image i to the others.
        config: number of keyframes and neighbours.
    """
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


def exhaustive_graph(similarity: Float32) -> ViewGraph:
    """Every pair of the N images of similarity [N, N]."""
    values = _checked(similarity)
    first, second = np.triu_indices(len(values), k=1)
    return _graph(values, np.stack([first, second], axis=1), np.full(len(first), Reason.EXHAUSTIVE))


def retrieval_graph(similarity: Float32, *, keyframes: int, neighbours: int, start: int | None = None) -> ViewGraph:
    """Keyframes with each other, every other image with its nearest keyframe, every image with its nearest images.

    A pair found in several ways carries the first of these reasons. The graph is connected.

    Args:
        similarity: [N, N] in [0, 1]; row i holds the similarity of image i to the others. The diagonal is not read.
        keyframes: number of keyframes, at least 1; capped at N.
        neighbours: nearest images of every image, itself not counted; capped at N − 1.
        start: the first keyframe, as for `farthest_keyframes`.

    Returns:
        The graph; the score of a pair is the mean of both directions.
    """
    values = _checked(similarity)
    count = len(values)
    if count < 2:
        return exhaustive_graph(similarity)
    chosen = farthest_keyframes(similarity, keyframes, start=start)
    others = np.setdiff1d(np.arange(count), chosen)
    first, second = np.triu_indices(len(chosen), k=1)
    among = np.stack([chosen[first], chosen[second]], axis=1)
    to_keyframe = np.stack([others, chosen[values[np.ix_(others, chosen)].argmax(axis=1)]], axis=1)
    near = _nearest_images(values, min(neighbours, count - 1))
    to_near = np.stack([np.repeat(np.arange(count), near.shape[1]), near.ravel()], axis=1)
    sizes = [len(among), len(to_keyframe), len(to_near)]
    reason = np.repeat([Reason.KEYFRAME, Reason.NEAREST, Reason.NEIGHBOUR], sizes)
    return connected(_graph(values, np.concatenate([among, to_keyframe, to_near]), reason), similarity)


def farthest_keyframes(similarity: Float32, count: int, *, start: int | None = None) -> NDArray[np.int64]:
    """Farthest-point sampling: each next keyframe is the image least similar to all that were picked.

    Args:
        similarity: [N, N]; the rows of picked images are read.
        count: at least 1; capped at N, which is at least 1.
        start: the first keyframe; by default the image with the largest total similarity to the others, the heart of
            the collection. Of equals, the first is taken, here and later.

    Returns:
        [min(count, N)] images in the order they were picked.
    """
    values = _checked(similarity)
    if start is None:
        start = int((values.sum(axis=0) + values.sum(axis=1) - 2 * values.diagonal()).argmax())
    chosen = [start]
    closest = values[start].copy()
    while len(chosen) < min(count, len(values)):
        # A picked image may look far from itself where similarities are small: it must not be picked again.
        closest[chosen] = np.inf
        chosen.append(int(closest.argmin()))
        closest = np.maximum(closest, values[chosen[-1]])
    return np.array(chosen)


def graph_of_pairs(similarity: Float32, pairs: Int64, reason: Reason) -> ViewGraph:
    """The graph of given pairs [P, 2], in any order and orientation, each as often as it may be.

    Args:
        similarity: [N, N] in [0, 1].
        pairs: of two different images each.
        reason: of all of them.
    """
    return _graph(_checked(similarity), pairs, np.full(len(pairs), reason))


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


def reserve(similarity: Float32, graph: ViewGraph, count: int) -> ViewGraph:
    """The pairs worth matching next: of every image with the `count` most similar ones that `graph` leaves out."""
    values = _checked(similarity)
    values[tuple(graph.pairs.T)] = values[tuple(graph.pairs[:, ::-1].T)] = -1.0
    near = _nearest_images(values, min(count, max(len(values) - 1, 0)))
    pairs = np.stack([np.repeat(np.arange(len(values)), near.shape[1]), near.ravel()], axis=1)
    pairs = pairs[values[tuple(pairs.T)] >= 0]
    return graph_of_pairs(similarity, pairs, Reason.SECOND_ROUND)


def connected(graph: ViewGraph, similarity: Float32) -> ViewGraph:
    """Join the components of a graph, each time by the most similar pair between two, marked as a bridge.

    Args:
        graph: any graph over N images.
        similarity: [N, N] in [0, 1].

    Returns:
        The graph itself where it is connected, otherwise one with as few more pairs as can be.
    """
    values = _checked(similarity)
    if len(values) != graph.num_images:
        raise ShapeError(f"similarity of {len(values)} images for a graph of {graph.num_images}")
    added = _bridges((values + values.T) / 2, _labels(graph))
    if not len(added):
        return graph
    reason = np.concatenate([graph.reason, np.full(len(added), Reason.BRIDGE)])
    return _graph(values, np.concatenate([graph.pairs, added]), reason)


def _bridges(values: NDArray[np.float64], label: Int32) -> NDArray[np.int64]:
    """Prim's maximum spanning tree over components: reads each row of the similarity once."""
    pairs = []
    inside = np.zeros(len(label), bool)
    best = np.full(len(label), -np.inf)
    source = np.zeros(len(label), np.int64)
    joined = np.int64(0)
    for _ in range(int(label.max(initial=0))):
        new = np.flatnonzero(label == label[joined])
        inside[new] = True
        nearest = new[values[new].argmax(axis=0)]
        reach = values[nearest, np.arange(len(label))]
        source = np.where(reach > best, nearest, source)
        best = np.maximum(reach, best)
        joined = np.where(inside, -np.inf, best).argmax()
        pairs.append((source[joined], joined))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _labels(graph: ViewGraph) -> Int32:
    shape = (graph.num_images, graph.num_images)
    edges = scipy.sparse.coo_array((np.ones(len(graph.pairs), bool), tuple(graph.pairs.T)), shape=shape)
    label: Int32 = connected_components(edges, directed=False)[1]
    return label


def _nearest_images(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    distance = -values
    np.fill_diagonal(distance, np.inf)
    return np.argsort(distance, axis=1, kind="stable")[:, :count]


def _graph(values: NDArray[np.float64], pairs: NDArray[np.integer], reason: NDArray[np.integer]) -> ViewGraph:
    """Canonical, sorted and unique pairs; of one found twice, the lowest reason stays."""
    low, high = pairs.min(axis=1).astype(np.int64), pairs.max(axis=1).astype(np.int64)
    order = np.lexsort((reason, high, low))
    kept = order[np.unique(low[order] * len(values) + high[order], return_index=True)[1]]
    low, high = low[kept], high[kept]
    score = (values[low, high] + values[high, low]) / 2
    return ViewGraph(
        num_images=len(values),
        pairs=np.stack([low, high], axis=1).astype(np.int32),
        score=np.clip(score, 0, 1).astype(np.float32),
        reason=reason[kept].astype(np.int32),
    )


def _checked(similarity: Float32) -> NDArray[np.float64]:
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ShapeError(f"similarity has shape {similarity.shape}, expected [N, N]")
    if not np.isfinite(similarity).all():
        raise ShapeError("similarity holds NaN or infinite values")
    return similarity.astype(np.float64)
