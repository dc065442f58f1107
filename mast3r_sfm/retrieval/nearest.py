"""The most similar images of every image, gathered from parts of a similarity matrix that is never there as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Float32, Int32, Int64

_LOW = np.int64(2**32 - 1)
_NOTHING = np.iinfo(np.int64).min


@dataclass(frozen=True, kw_only=True)
class NearestImages:
    """Of every image, those that are most similar to it, itself left out."""

    image: Int32
    """[N, k] the most similar first; of equals, the one of lower number."""
    score: Float32
    """[N, k]."""

    def __post_init__(self) -> None:
        if self.image.ndim != 2 or self.image.shape != self.score.shape:
            raise ShapeError(f"nearest images {self.image.shape} and their scores {self.score.shape} must be [N, k]")

    def first(self, count: int) -> NearestImages:
        """The `count` most similar of them."""
        return NearestImages(image=self.image[:, :count], score=self.score[:, :count])


class RunningNearest:
    """Keeps the most similar images in view of parts of the matrix, which come in any order."""

    def __init__(self, num_images: int, count: int) -> None:
        self._count = max(min(count, num_images - 1), 0)
        self._best = np.full((num_images, self._count), _NOTHING)

    def add(self, rows: slice, columns: slice, values: Float32) -> None:
        """Similarity [R, C] of the images `rows` to the images `columns`; each pair is to come once."""
        if not self._count or not values.size:
            return
        keys = sortable(values, np.arange(columns.start, columns.stop))
        same = np.arange(max(rows.start, columns.start), min(rows.stop, columns.stop))
        keys[same - rows.start, same - columns.start] = _NOTHING
        best = self._best[rows]
        better = np.flatnonzero(keys.max(axis=1) > best.min(axis=1))
        merged = np.concatenate([best[better], keys[better]], axis=1)
        best[better] = np.partition(merged, -self._count, axis=1)[:, -self._count :]

    def result(self) -> NearestImages:
        """What was found, once all parts have come."""
        score, image = unsorted(np.sort(self._best, axis=1)[:, ::-1])
        return NearestImages(image=image, score=score)


def sortable(values: Float32, index: Int64) -> Int64:
    """Whole numbers that are larger where a value is larger or, of equal values, its index (below 2³²) is lower."""
    # The bits of a float of positive sign sort as whole numbers do; those of negative sign the other way round.
    bits = (np.asarray(values, np.float32) + np.float32(0)).view(np.int32)
    keys = _in_order(bits).astype(np.int64)
    keys <<= 32
    keys |= _LOW - index
    return keys


def unsorted(keys: Int64) -> tuple[Float32, Int32]:
    """The values and indices that `sortable` made whole numbers of."""
    bits = _in_order((keys >> 32).astype(np.int32))
    return bits.view(np.float32), (_LOW - (keys & _LOW)).astype(np.int32)


def _in_order(bits: Int32) -> Int32:
    return bits ^ ((bits >> 31) & np.int32(2**31 - 1))
