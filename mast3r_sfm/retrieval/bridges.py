"""The pairs that join the components of a graph."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree

from mast3r_sfm.retrieval.nearest import sortable, unsorted
from mast3r_sfm.retrieval.similarity import Similarity
from mast3r_sfm.types import Float32, Int32, Int64

_CELLS_AT_ONCE = 1 << 20


def find_bridges(similarity: Similarity, label: Int32) -> Int64:
    """The most similar pairs that join all components: a maximum spanning tree.

    Pairs are ordered by falling similarity and then by number, so the tree is unique. Every pair between components has
    an end outside the largest, so that only the rows of these images are needed. They come in blocks, and of each
    block those pairs are kept that are in the tree of what was seen so far: no other pair can be in the tree of all.

    Args:
        similarity: of N images; a pair counts with the mean of both directions.
        label: [N] component of each image, from 0.

    Returns:
        [components − 1, 2] pairs.
    """
    if not len(label) or not label.max():
        return np.zeros((0, 2), np.int64)
    by_component = np.argsort(label, kind="stable")
    begin = np.searchsorted(label[by_component], np.arange(label.max() + 1))
    outside = np.flatnonzero(label != np.bincount(label).argmax())
    pairs, score = np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
    size = max(_CELLS_AT_ONCE // len(label), 1)
    for low in range(0, len(outside), size):
        images = outside[low : low + size]
        keys = sortable(similarity.mutual(images)[:, by_component], by_component)
        value, other = unsorted(np.maximum.reduceat(keys, begin, axis=1))
        source = np.broadcast_to(images[:, None], other.shape)
        between = label[source] != label[other]
        found = np.stack([source[between], other[between]], axis=1)
        pairs, score = np.concatenate([pairs, np.sort(found, axis=1)]), np.concatenate([score, value[between]])
        kept = _spanning(pairs, score, label)
        pairs, score = pairs[kept], score[kept]
    return pairs


def _spanning(pairs: Int64, score: Float32, label: Int32) -> NDArray[np.integer]:
    """Which pairs [P, 2] make up the maximum spanning forest over components."""
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -score))
    ends = np.sort(label[pairs[order]], axis=1).astype(np.int64)
    components = int(label.max()) + 1
    # Of the pairs between two components, the first; np.unique knows it by its place in the order.
    rank = np.unique(ends[:, 0] * components + ends[:, 1], return_index=True)[1]
    # Ranks are weights that differ, which makes the tree unique; zero would mean that there is no edge.
    weights = coo_array((rank + 1.0, tuple(ends[rank].T)), shape=(components, components))
    return order[np.sort(minimum_spanning_tree(weights.tocsr()).data.astype(np.int64) - 1)]
