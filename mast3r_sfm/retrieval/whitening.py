"""PCA whitening with shrinkage, learnt from the collection itself.

Source: Jégou and Chum, "Negative evidences and co-occurences in image retrieval: the benefit of PCA and whitening",
ECCV 2012; the exponent of the shrinkage as in Tolias et al., "Learning and aggregating deep local descriptors for
instance-level recognition", ECCV 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Float32, Float64

# Directions with less than this share of the largest variance are rounding noise of half-precision tokens.
_SMALLEST_VARIANCE = 1e-7
# What a codebook is learnt from is gigabytes in double precision, so it passes in parts.
_TOKENS_AT_ONCE = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """The affine map y = (x − mean) · projection."""

    mean: Float64
    """[C]."""
    projection: Float64
    """[C, D], D ≤ C."""

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.projection.ndim != 2 or len(self.projection) != len(self.mean):
            raise ShapeError(
                f"Whitening: mean {self.mean.shape} and projection {self.projection.shape} must be [C] and [C, D]"
            )

    def apply(self, tokens: NDArray[Any]) -> Float32:
        """Whiten tokens [T, C] to [T, D]; neither side is scaled to unit length."""
        if tokens.ndim != 2 or tokens.shape[1] != len(self.mean):
            raise ShapeError(f"tokens have shape {tokens.shape}, expected [*, {len(self.mean)}]")
        white = np.empty((len(tokens), self.projection.shape[1]), np.float32)
        for low in range(0, len(tokens), _TOKENS_AT_ONCE):
            # In double precision: the last bits of a float32 product depend on the number of threads, and a bit that
            # flips changes the words, and so the pairs.
            part = tokens[low : low + _TOKENS_AT_ONCE].astype(np.float64) - self.mean
            white[low : low + _TOKENS_AT_ONCE] = part @ self.projection
        return white


class TokenMoments:
    """Count, mean and covariance of all tokens of a collection, fed image by image, in the memory of one matrix."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.count = 0
        self._mean = np.zeros(channels)
        self._scatter = np.zeros((channels, channels))

    def add(self, tokens: NDArray[Any]) -> None:
        """Take in the tokens [T, C] of one image.

        Raises:
            ShapeError: the number of channels differs from that of the images before.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.channels:
            raise ShapeError(f"tokens have shape {tokens.shape}, expected [*, {self.channels}] as in the first image")
        if not len(tokens):
            return
        values = tokens.astype(np.float64)
        mean = values.mean(axis=0)
        centred = values - mean
        # Merging the moments of two sets (Chan, Golub and LeVeque 1983) cancels nothing, unlike E[xx'] − mm'.
        step = mean - self._mean
        total = self.count + len(values)
        self._scatter += centred.T @ centred + np.outer(step, step) * (self.count * len(values) / total)
        self._mean = self._mean + step * (len(values) / total)
        self.count = total

    def whitening(self, shrinkage: float = 1.0) -> Whitening:
        """PCA whitening of what was taken in: direction i is scaled by variance_i^(−shrinkage/2).

        Args:
            shrinkage: 1 gives every direction unit variance, 0 only rotates.

        Returns:
            Whitening with directions by falling variance; those without variance are dropped. The largest entry of
            each direction is positive, which fixes the sign that an eigenvector leaves open.
        """
        covariance = self._scatter / max(self.count, 1)
        variance, directions = np.linalg.eigh(covariance)
        variance, directions = variance[::-1], directions[:, ::-1]
        kept = variance > _SMALLEST_VARIANCE * variance.max(initial=0.0)
        variance, directions = variance[kept], directions[:, kept]
        lowest, highest = directions.min(axis=0, initial=0.0), directions.max(axis=0, initial=0.0)
        directions = np.where(-lowest > highest, -directions, directions)
        return Whitening(mean=self._mean.copy(), projection=directions * variance ** (-shrinkage / 2))
