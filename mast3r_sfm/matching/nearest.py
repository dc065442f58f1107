"""Mutual nearest neighbours of two descriptor sets: the fast kernel, and the plain one it is tested against."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

# 128 × 4,096 products stay in the second-level cache; measured three times as fast as one large product.
ROWS_PER_BLOCK = 128
_SAME = 1e-3
"""Distance below which two float32 descriptors are the same, to within rounding."""


class Matches(NamedTuple):
    """Descriptors that are each other's most similar."""

    pairs: NDArray[np.int64]
    """[M, 2] indices, ascending by the first."""
    similarity: NDArray[np.float32]
    """[M] cosine."""
    ratio: NDArray[np.float32]
    """[M] their distance over that of the second nearest, of either; 1 where another is as near (Lowe, Distinctive
    image features from scale-invariant keypoints, 2004)."""


@torch.inference_mode()
def mutual_nearest(first: torch.Tensor, second: torch.Tensor, min_similarity: float) -> Matches:
    """Pairs of descriptors that are each other's most similar, without ever holding the whole similarity matrix.

    Of equally similar neighbours of a row the first counts; a column accepts any row that reaches its maximum, and of
    several such rows the first is kept, so that every descriptor is used at most once.

    Args:
        first: [A, D] unit descriptors.
        second: [B, D] unit descriptors on the same device.
        min_similarity: cosine below which a pair is dropped.
    """
    if min(len(first), len(second)) == 0:
        none = np.zeros(0, np.float32)
        return Matches(np.zeros((0, 2), np.int64), none, none)
    column_best = torch.full((len(second),), -torch.inf, device=first.device)
    row_best, row_index = [], []
    transposed = second.T.contiguous()
    for start in range(0, len(first), ROWS_PER_BLOCK):
        similarity = first[start : start + ROWS_PER_BLOCK] @ transposed  # [rows, B]
        best, index = similarity.max(dim=1)
        row_best.append(best)
        row_index.append(index)
        # amax without indices is twenty times as fast along the rows as max with them.
        column_best = torch.maximum(column_best, similarity.amax(dim=0))
    best, index = torch.cat(row_best), torch.cat(row_index)
    rows = ((best >= column_best[index]) & (best >= min_similarity)).nonzero()[:, 0]
    pairs = torch.stack([rows, index[rows]], dim=1)
    _, kept = np.unique(pairs[:, 1].cpu().numpy(), return_index=True)
    kept.sort()
    pairs = pairs[torch.from_numpy(kept).to(pairs.device)]
    similarity = best[pairs[:, 0]].float()
    runner_up = torch.maximum(
        _runner_up(first[pairs[:, 0]], second, pairs[:, 1]), _runner_up(second[pairs[:, 1]], first, pairs[:, 0])
    )
    ratio = _distance(similarity) / _distance(runner_up.float())
    return Matches(pairs.cpu().numpy(), similarity.cpu().numpy(), ratio.clamp(max=1).cpu().numpy())


def _runner_up(queries: torch.Tensor, others: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """[M] the largest similarity of each query to any but its best; -inf where there is no other."""
    transposed, found = others.T.contiguous(), []
    for start in range(0, len(queries), ROWS_PER_BLOCK):
        part = slice(start, start + ROWS_PER_BLOCK)
        similarity = queries[part] @ transposed
        similarity.scatter_(1, best[part, None], -torch.inf)
        found.append(similarity.amax(dim=1))
    return torch.cat(found) if found else queries.new_zeros(0)


def _distance(similarity: torch.Tensor) -> torch.Tensor:
    """Between unit vectors of that cosine."""
    return (2 - 2 * similarity.clamp(min=-1)).clamp(min=_SAME**2).sqrt()


def mutual_nearest_plain(first: NDArray[np.float32], second: NDArray[np.float32], min_similarity: float) -> Matches:
    """What `mutual_nearest` computes, one row after the other; for tests."""
    pairs, similarities, ratios = [], [], []
    taken: set[int] = set()
    similarity = first @ second.T
    for row in range(len(first)):
        column = int(np.argmax(similarity[row])) if len(second) else -1
        if column < 0 or column in taken:
            continue
        value = similarity[row, column]
        if value >= similarity[:, column].max() and value >= min_similarity:
            pairs.append((row, column))
            similarities.append(value)
            others = np.concatenate([np.delete(similarity[row], column), np.delete(similarity[:, column], row)])
            distance, runner_up = np.sqrt(np.maximum(2 - 2 * np.array([value, others.max(initial=-1)]), _SAME**2))
            ratios.append(min(distance / runner_up, 1))
            taken.add(column)
    return Matches(
        np.array(pairs, np.int64).reshape(-1, 2), np.array(similarities, np.float32), np.array(ratios, np.float32)
    )
