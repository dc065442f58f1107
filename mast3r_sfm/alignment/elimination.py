"""Elimination of the depths of anchors: what edges that see the same anchors say of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mast3r_sfm.alignment.normal import Coupling, Matrix, add_matrices, sum_blocks, sum_vectors
from mast3r_sfm.types import Bool, Float64, Int32, Int64

_PIECE = 16
"""Pairs whose products are summed at a time."""
_AT_ONCE = 256
"""Pieces whose matches are gathered at a time, so that they stay in the cache."""


@dataclass(frozen=True, kw_only=True)
class SharedAnchors:
    """Pairs of matches, of the edges of one group, that see one anchor; the same in every step.

    The matches of the group are numbered throughout, by batch, edge and place. Pairs stand in pieces of one length,
    which hold the matches of two edges each.
    """

    left: Int32
    """[n, 16] matches, and their number R where a piece is not full."""
    right: Int32
    """[n, 16]."""
    first: Int64
    """[m] first piece of each two edges."""
    edges: Int64
    """[m, 2] numbers of the edges in the group."""


def find_shared(anchors: Int64, edges: Int64, used: Bool) -> SharedAnchors:
    """Pairs among matches that see anchors [R], of edges [R], where `used` [R]."""
    order = np.flatnonzero(used)
    order = order[np.lexsort((edges[order], anchors[order]))]
    seen, pairs, still = anchors[order], [np.zeros((0, 2), np.int64)], np.arange(len(order))
    for lag in range(1, len(order)):
        still = still[still + lag < len(order)]
        still = still[seen[still] == seen[still + lag]]
        if not len(still):
            break
        pairs.append(np.stack([order[still], order[still + lag]], axis=1))
    pair = np.concatenate(pairs)
    key = edges[pair] @ np.array([int(edges.max(initial=0)) + 1, 1])
    by_edges = np.argsort(key, kind="stable")
    pair = pair[by_edges]
    _, begin, count = np.unique(key[by_edges], return_index=True, return_counts=True)
    pieces = -(-count // _PIECE)
    first = np.cumsum(pieces) - pieces
    rank = np.arange(len(pair)) - np.repeat(begin, count)
    place = np.repeat(first, count) * _PIECE + rank
    sides = np.full((2, int(pieces.sum()) * _PIECE), len(anchors), np.int32)
    sides[:, place] = pair.T
    left, right = sides.reshape(2, -1, _PIECE)
    return SharedAnchors(left=left, right=right, first=first, edges=edges[pair[begin]])


def eliminate(
    couplings: Sequence[Coupling], gradient: Float64, shared: SharedAnchors, unknowns: int
) -> tuple[Matrix, Float64]:
    """What the depths of one group take from the matrix [P, P], and add to the right side [P].

    Args:
        couplings: of all batches of the group.
        gradient: [D] of the depths, over the root of the diagonal.
        shared: pairs of these matches.
        unknowns: P.
    """
    columns = np.concatenate([one.columns for one in couplings])
    chain = np.concatenate([one.chain for one in couplings])
    local = chain.shape[1]
    own = np.concatenate([one.values.transpose(0, 2, 1) @ one.values for one in couplings])
    right = np.concatenate(
        [(one.values.transpose(0, 2, 1) @ gradient[one.where][..., None])[..., 0] for one in couplings]
    )
    rows = np.concatenate([*(one.values.reshape(-1, local) for one in couplings), np.zeros((1, local))])
    blocks, (one, other) = 0.5 * own, np.arange(len(own))[None].repeat(2, axis=0)
    if len(shared.first):
        products = np.empty((len(shared.left), local, local))
        for begin in range(0, len(products), _AT_ONCE):
            piece = slice(begin, begin + _AT_ONCE)
            left = np.take(rows, shared.left[piece], axis=0).transpose(0, 2, 1)
            np.matmul(left, np.take(rows, shared.right[piece], axis=0), out=products[piece])
        summed = np.add.reduceat(products.reshape(len(products), -1), shared.first)
        blocks = np.concatenate([blocks, summed.reshape(-1, local, local)])
        one, other = (np.concatenate([a, b]) for a, b in zip((one, other), shared.edges.T, strict=True))
    half = sum_blocks(columns[one], columns[other], chain[one].transpose(0, 2, 1) @ (blocks @ chain[other]), unknowns)
    by_unknown = (chain.transpose(0, 2, 1) @ right[..., None])[..., 0]
    return add_matrices(half, half.T), sum_vectors(columns, by_unknown, unknowns)
