"""Nearest neighbours by comparing everything with everything.

Slow and plain: what the fast search in `blocks` must equal, and its last resort where nothing can be ruled out.

How near a descriptor d is to a query q is a score, the larger the nearer: q·d where descriptors are compared by their
product, q·d - |d|²/2 where they are compared by distance, which orders them as -|q - d|² does. Terms are added in
float64 in the order of the dimensions. The product of two float32 numbers is exact in float64, so a score depends on
nothing but its two descriptors: not on how the work is cut up, nor on whether a processor fuses product and sum. Equal
descriptors have equal scores, and of equal scores the lowest pixel wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS, COLUMNS = 256, 1024
"""Scores in one step: 2 MB, which stay in the cache."""


@dataclass(frozen=True, kw_only=True)
class PlainMap:
    """A descriptor map that is searched by comparing everything; does what `blocks.DescriptorMap` does."""

    size: tuple[int, int]
    """Height and width."""
    features: Tensor
    """[N, D] float32, row by row."""
    euclidean: bool

    @classmethod
    def build(cls, descriptors: Tensor, *, euclidean: bool = False) -> PlainMap:
        """From a map [H, W, D]."""
        height, width = descriptors.shape[:2]
        return cls(size=(height, width), features=descriptors.flatten(0, 1).float(), euclidean=euclidean)

    def nearest(self, queries: Tensor, guess: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Nearest pixels [Q] of descriptors [Q, D]; a guess is of no use here."""
        return nearest_exhaustive(queries, self.features, euclidean=self.euclidean)


def score_pairs(queries: Tensor, neighbours: Tensor, *, euclidean: bool) -> Tensor:
    """Scores of pairs.

    Args:
        queries: [P, D] float32.
        neighbours: [P, D] float32, one for each query.
        euclidean: compare by distance rather than by product.

    Returns:
        [P] float64.
    """
    total = _start(neighbours, euclidean=euclidean)
    for left, right in zip(queries.double().unbind(1), neighbours.double().unbind(1), strict=True):
        total.addcmul_(left, right)
    return total


def nearest_exhaustive(queries: Tensor, database: Tensor, *, euclidean: bool) -> Tensor:
    """The nearest of all descriptors to each query; of equally near ones the first.

    Args:
        queries: [Q, D] float32.
        database: [N, D] float32.
        euclidean: compare by distance rather than by product.

    Returns:
        [Q] int64 row of the database.
    """
    found = [_nearest(some, database, euclidean=euclidean) for some in torch.split(queries.float(), ROWS)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=queries.device)


def _nearest(queries: Tensor, database: Tensor, *, euclidean: bool) -> Tensor:
    best = torch.full((len(queries),), -torch.inf, dtype=torch.float64, device=queries.device)
    index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    left = queries.double()
    for start in range(0, len(database), COLUMNS):
        columns = database[start : start + COLUMNS]
        right = columns.double().T.contiguous()
        total = _start(columns, euclidean=euclidean).repeat(len(queries), 1)  # [Q, columns]
        for dimension in range(left.shape[1]):
            total.addcmul_(left[:, dimension, None], right[dimension])
        value, place = total.max(dim=1)
        better = value > best
        best = torch.where(better, value, best)
        index = torch.where(better, place + start, index)
    return index


def _start(neighbours: Tensor, *, euclidean: bool) -> Tensor:
    """[P] what the sum of products begins with."""
    total = torch.zeros(len(neighbours), dtype=torch.float64, device=neighbours.device)
    if euclidean:
        for values in neighbours.double().unbind(1):
            total.addcmul_(values, values)
    return total / -2
