"""Kinematic trees: which image hangs on which, from the scores of the pairs, one tree per connected part.

A maximum spanning tree follows the best pairs one by one. Clustering instead joins groups of images that see the same
place, and ties each group by the image that covers it best, which makes shallow trees (MASt3R-SfM, appendix).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse
from scipy.cluster.hierarchy import linkage
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from scipy.spatial.distance import squareform

from mast3r_sfm.alignment.edges import components
from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Float64, Int32

APART = 2.0
"""Distance of images without a pair; that of a pair without matches is 1."""
SATURATION_PER_CELL = 3.0


class TreeKind(enum.StrEnum):
    """How a tree is grown."""

    MAXIMUM = "maximum"
    WARD = "ward"
    AVERAGE = "average"
    SINGLE = "single"


_Method = Literal["ward", "average", "single"]
_METHODS: dict[TreeKind, _Method] = {TreeKind.WARD: "ward", TreeKind.AVERAGE: "average", TreeKind.SINGLE: "single"}


@dataclass(frozen=True, kw_only=True)
class KinematicTree:
    """A tree over the images of one connected part."""

    root: int
    edges: Int32
    """[n − 1, 2] parent and child, breadth first."""


def saturating_score(cells: float) -> float:
    """The number of matches beyond which a pair is as good as any, for images of `cells` grid cells."""
    return SATURATION_PER_CELL * cells


def kinematic_trees(
    pairs: Int32, scores: Float64, num_images: int, kind: TreeKind, saturation: float
) -> list[KinematicTree]:
    """One tree per connected part of the pairs, largest part first; single images are trees without edges.

    Args:
        pairs: [P, 2] image numbers.
        scores: [P] positive, such as the number of matches.
        num_images: how many images there are.
        kind: of tree.
        saturation: for clustering, the score from which pairs count alike.

    Raises:
        ShapeError: a score is not positive and finite.
    """
    if not (np.isfinite(scores) & (scores > 0)).all():
        raise ShapeError("the scores of the pairs of a tree must be positive and finite")
    trees = []
    for part in components(num_images, pairs):
        inside = np.isin(pairs[:, 0], part)
        local = np.sort(np.searchsorted(part, pairs[inside]), axis=1)
        matrix = np.zeros((len(part), len(part)))
        matrix[local[:, 0], local[:, 1]] = matrix[local[:, 1], local[:, 0]] = scores[inside]
        tree = (
            _maximum_tree(matrix) if kind is TreeKind.MAXIMUM else _clustered_tree(matrix, _METHODS[kind], saturation)
        )
        root, edges = _hang(tree, len(part))
        trees.append(KinematicTree(root=int(part[root]), edges=part[edges].astype(np.int32).reshape(-1, 2)))
    return trees


def _maximum_tree(scores: Float64) -> Int32:
    """[n − 1, 2] pairs of the spanning tree of largest total score."""
    # The solver drops explicit zeros and minimises, so scores become costs of at least 1.
    cost = np.where(np.triu(scores) > 0, 1 + scores.max(initial=0.0) - scores, 0.0)
    first, second = minimum_spanning_tree(scipy.sparse.csr_array(cost)).nonzero()
    return np.stack([first, second], axis=1).astype(np.int32)


def _clustered_tree(scores: Float64, method: _Method, saturation: float) -> Int32:
    """[n − 1, 2] pairs that join the clusters, each by its representative."""
    if len(scores) == 1:
        return np.zeros((0, 2), np.int32)
    similarity = np.minimum(scores, saturation) / saturation
    distance = np.where(scores > 0, 1.0 - similarity, APART)
    np.fill_diagonal(distance, 0.0)
    np.fill_diagonal(similarity, 1.0)
    covered = list(similarity)  # how well each cluster covers every image
    representative = list(range(len(scores)))
    pairs = []
    for left, right in linkage(squareform(distance, checks=False), method=method)[:, :2].astype(int):
        pairs.append(sorted((representative[left], representative[right])))
        better = left if covered[left].sum() > covered[right].sum() else right
        representative.append(representative[better])
        covered.append(np.maximum(covered[left], covered[right]))
    return np.array(pairs, np.int32)


def _hang(tree: Int32, count: int) -> tuple[int, Int32]:
    """The root, and [n − 1, 2] parents and children breadth first.

    The root lies as far as possible, in breadth-first order, from both ends of a longest path.
    """
    graph = scipy.sparse.csr_array((np.ones(len(tree)), (tree[:, 0], tree[:, 1])), shape=(count, count))
    end = breadth_first_order(graph, 0, directed=False)[0][-1]
    order = breadth_first_order(graph, end, directed=False)[0]
    back = breadth_first_order(graph, order[-1], directed=False)[0]
    rank, rank_back = np.empty(count, int), np.empty(count, int)
    rank[order], rank_back[back] = np.arange(count), np.arange(count)
    root = int(np.minimum(rank, rank_back).argmax())
    order, parent = breadth_first_order(graph, root, directed=False)
    return root, np.stack([parent[order[1:]], order[1:]], axis=1).astype(np.int32)
