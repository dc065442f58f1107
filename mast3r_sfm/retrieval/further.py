"""The most similar images that a graph leaves out."""

from __future__ import annotations

import numpy as np

from mast3r_sfm.retrieval.nearest import sortable, unsorted
from mast3r_sfm.retrieval.similarity import NEAREST_KEPT, Similarity
from mast3r_sfm.types import Bool, Int64, ViewGraph

_CELLS_AT_ONCE = 1 << 20


def further_pairs(similarity: Similarity, graph: ViewGraph, count: int) -> Int64:
    """Of every image those with the `count` most similar images that are no pair of `graph`, as far as there are any.

    The nearest images that are known anyway mostly suffice; only images that the graph joins to most of theirs need
    their rows.

    Returns:
        [P, 2] pairs, of which the same may come from both its images.
    """
    images = np.arange(len(similarity))
    both = np.concatenate([graph.pairs, graph.pairs[:, ::-1]]).astype(np.int64)
    taken = np.sort(both[:, 0] * len(images) + both[:, 1])
    wanted = np.minimum(count, len(images) - 1 - np.bincount(both[:, 0], minlength=len(images)))
    near = similarity.nearest(NEAREST_KEPT).image.astype(np.int64)
    free = ~_is_among(images[:, None] * len(images) + near, taken)
    chosen = free & (free.cumsum(axis=1) <= wanted[:, None])
    pairs = [np.stack([np.nonzero(chosen)[0], near[chosen]], axis=1)]
    short = np.flatnonzero(chosen.sum(axis=1) < wanted)
    size = max(_CELLS_AT_ONCE // max(len(images), 1), 1)
    for low in range(0, len(short), size):
        some = short[low : low + size]
        keys = sortable(similarity.rows(some), images)
        keys[_is_among(some[:, None] * len(images) + images, taken) | (some[:, None] == images)] = np.iinfo(
            np.int64
        ).min
        other = unsorted(np.sort(keys, axis=1)[:, ::-1][:, :count])[1].astype(np.int64)
        kept = np.arange(other.shape[1]) < wanted[some][:, None]
        pairs.append(np.stack([np.broadcast_to(some[:, None], other.shape)[kept], other[kept]], axis=1))
    return np.concatenate(pairs)


def _is_among(values: Int64, ordered: Int64) -> Bool:
    """Where `values` are in a sorted list."""
    if not len(ordered):
        return np.zeros(values.shape, bool)
    found: Bool = ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
    return found
