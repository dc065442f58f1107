"""A second round of pairs: those that the verified ones of the first make likely.

Retrieval compares what photos look like; verified pairs tell where they were taken. Two photos that both match a third
one probably overlap, and a part of the collection that nothing holds to the rest may have been given the wrong pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.matching.checker import Pair
from mast3r_sfm.matching.hard import STRONG_EVIDENCE, evidence, strong_parts
from mast3r_sfm.types import ViewGraph

SATURATED = 4 * STRONG_EVIDENCE
"""Evidence beyond which a pair counts no more."""


def propose_pairs(edges: Sequence[EpipolarEdge], reserve: ViewGraph, per_image: int) -> list[Pair]:
    """Pairs that were not matched, and are worth it now.

    - Friends of friends: each image with the `per_image` ones to which the strongest chains of two verified pairs lead.
    - Between parts that strong pairs do not join: each image of the smaller part with its 2 · `per_image` most similar
      images of other parts, as far as the reserve has them.

    Args:
        edges: all pairs matched so far.
        reserve: the next most similar pairs.
        per_image: how many pairs of either kind an image asks for.

    Returns:
        pairs, sorted, each once, none of them among `edges`.
    """
    count = reserve.num_images
    tried = {(edge.first, edge.second) for edge in edges}
    found = _friends_of_friends(edges, count, per_image) | _between_parts(edges, reserve, per_image)
    return sorted(found - tried)


def _friends_of_friends(edges: Sequence[EpipolarEdge], count: int, per_image: int) -> set[Pair]:
    weight = np.sqrt(np.minimum([evidence(edge) for edge in edges], SATURATED))
    pairs = np.array([(edge.first, edge.second) for edge in edges], np.int64).reshape(-1, 2)
    one_way = scipy.sparse.coo_array((weight, tuple(pairs.T)), shape=(count, count))
    links = (one_way + one_way.T).tocsr()
    paths = (links @ links).tocsr()  # [N, N] Σ over common friends of the geometric mean of both links
    paths.setdiag(0)
    matched = scipy.sparse.coo_array((np.ones(len(pairs)), tuple(pairs.T)), shape=(count, count))
    paths = (paths - paths.multiply((matched + matched.T) > 0)).tocsr()
    found = set()
    for image in range(count):
        row = paths[[image]].tocoo()
        best = np.lexsort((row.coords[1], -row.data))[:per_image]
        others = row.coords[1][best][row.data[best] > 0].tolist()
        found |= {(min(image, other), max(image, other)) for other in others}
    return found


def _between_parts(edges: Sequence[EpipolarEdge], reserve: ViewGraph, per_image: int) -> set[Pair]:
    part = strong_parts(edges, reserve.num_images)
    size = np.bincount(part)
    asked = np.zeros(reserve.num_images, np.int64)
    found = set()
    for number in np.argsort(-reserve.score, kind="stable"):
        i, j = (int(image) for image in reserve.pairs[number])
        if part[i] == part[j]:
            continue
        small = i if size[part[i]] <= size[part[j]] else j
        if asked[small] < 2 * per_image:
            asked[small] += 1
            found.add((i, j))
    return found
