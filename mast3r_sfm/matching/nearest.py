"""Mutual nearest neighbours of two descriptor sets: the fast kernel, and the plain one it is tested against."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

# 128 × 4,096 products stay in the second-level cache; measured three times as fast as one large product.
ROWS_PER_BLOCK = 128
_ONEDNN = torch.backends.mkldnn.is_available() and all(  # type: ignore[no-untyped-call]
    hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
)
"""Whether this torch has the product of oneDNN that its own compiler uses."""
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
    others = torch.full((len(second),), -torch.inf, device=first.device)
    best, index, runner_up = [], [], []
    similar = _similarity_to(second)
    for start in range(0, len(first), ROWS_PER_BLOCK):
        similarity = similar(first[start : start + ROWS_PER_BLOCK])
        index.append(_argmax(similarity))
        best.append(similarity.gather(1, index[-1][:, None])[:, 0])
        # Without the rows' best, one look along either side gives what comes second.
        similarity.scatter_(1, index[-1][:, None], -torch.inf)
        runner_up.append(similarity.amax(dim=1))
        others = torch.maximum(others, similarity.amax(dim=0))
    return _mutual(torch.cat(best), torch.cat(index), torch.cat(runner_up), others, min_similarity)


def _similarity_to(others: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gives the products [R, B] of rows [R, D] with [B, D] others."""
    if others.device.type == "cpu" and others.dtype == torch.float32 and _ONEDNN:
        # Not by torch.mm, which asks MKL: on AMD processors with AVX-512, that takes more than twice the time.
        packed = torch.ops.mkldnn._reorder_linear_weight(others, ROWS_PER_BLOCK)
        return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    transposed = others.T.contiguous()
    return lambda rows: rows @ transposed


def _mutual(
    best: torch.Tensor, index: torch.Tensor, runner_up: torch.Tensor, others: torch.Tensor, min_similarity: float
) -> Matches:
    """The mutual ones among the rows' best.

    Args:
        best: [A] the largest similarity of each row.
        index: [A] its column.
        runner_up: [A] the largest of the row's others.
        others: [B] the largest similarity of each column, of those that are not their row's best.
        min_similarity: as for `mutual_nearest`.
    """
    # By column, the most similar row first, and of equal ones the first: the rows after it are its rivals.
    order = torch.argsort(best, descending=True, stable=True)
    order = order[torch.argsort(index[order], stable=True)]
    column = index[order]
    is_first = torch.ones(len(order), dtype=torch.bool, device=order.device)
    is_first[1:] = column[1:] != column[:-1]
    rival = torch.full_like(best, -torch.inf)
    rival[:-1] = torch.where(is_first[1:], -torch.inf, best[order][1:])
    second = torch.maximum(rival, others[column])
    chosen = is_first & (best[order] >= others[column]) & (best[order] >= min_similarity)
    rows, second = order[chosen], second[chosen]
    ratio = _distance(best[rows].float()) / _distance(torch.maximum(second, runner_up[rows]).float())
    ascending = torch.argsort(rows)
    rows, ratio = rows[ascending], ratio[ascending].clamp(max=1)
    pairs = torch.stack([rows, index[rows]], dim=1)
    return Matches(pairs.cpu().numpy(), best[rows].float().cpu().numpy(), ratio.cpu().numpy())


def _argmax(values: torch.Tensor) -> torch.Tensor:
    """[R] the first of each row's largest values [R, C]."""
    # On a CPU, torch looks for a maximum and its place ten times as long as NumPy.
    return torch.from_numpy(values.numpy().argmax(axis=1)) if values.device.type == "cpu" else values.argmax(dim=1)


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
