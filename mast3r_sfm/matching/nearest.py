"""Mutual nearest neighbours of two descriptor sets: the fast kernel, and the plain one it is tested against."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

# 128 × 4,096 products stay in the second-level cache; measured three times as fast as one large product.
ROWS_PER_BLOCK = 128

Matches = tuple[NDArray[np.int64], NDArray[np.float32]]


@torch.inference_mode()
def mutual_nearest(first: torch.Tensor, second: torch.Tensor, min_similarity: float) -> Matches:
    """Pairs of descriptors that are each other's most similar, without ever holding the whole similarity matrix.

    Of equally similar neighbours of a row the first counts; a column accepts any row that reaches its maximum, and of
    several such rows the first is kept, so that every descriptor is used at most once.

    Args:
        first: [A, D] unit descriptors.
        second: [B, D] unit descriptors on the same device.
        min_similarity: cosine below which a pair is dropped.

    Returns:
        [M, 2] indices, ascending by the first; [M] their similarity.
    """
    if min(len(first), len(second)) == 0:
        return np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
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
    pairs = torch.stack([rows, index[rows]], dim=1).cpu().numpy()
    _, kept = np.unique(pairs[:, 1], return_index=True)
    kept.sort()
    return pairs[kept], best[rows].float().cpu().numpy()[kept]


def mutual_nearest_plain(first: NDArray[np.float32], second: NDArray[np.float32], min_similarity: float) -> Matches:
    """What `mutual_nearest` computes, one row after the other; for tests."""
    pairs, similarities = [], []
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
            taken.add(column)
    return np.array(pairs, np.int64).reshape(-1, 2), np.array(similarities, np.float32)
