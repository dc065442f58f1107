"""Similarity transforms between two sets of corresponding points.

`align_similarity` is the least-squares solution of S. Umeyama, "Least-Squares Estimation of Transformation Parameters
Between Two Point Patterns", PAMI 13(4), 1991, equations 34–43. `align_similarity_robust` wraps it in the least median
of squares of P. Rousseeuw, "Least Median of Squares Regression", JASA 79, 1984.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Float64

# At half of the points wrong, one sample of three in eight is clean: 200 samples all miss with a chance of 3e-12.
_SAMPLES = 200
_REFITS = 5
# Points whose spread is this much smaller across a line than along it fix no rotation about that line.
_FLAT = 1e-8


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """target_from_source: x_target = scale · rotation · x_source + translation."""

    scale: float
    """Positive, target units per source unit."""
    rotation: Float64
    """[3, 3], determinant +1."""
    translation: Float64
    """[3] in target units."""

    def __post_init__(self) -> None:
        if self.rotation.shape != (3, 3) or self.translation.shape != (3,):
            raise ShapeError(
                f"a similarity needs a rotation [3, 3] and a translation [3], not {self.rotation.shape} "
                f"and {self.translation.shape}"
            )
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ShapeError(f"the scale of a similarity must be positive and finite, not {self.scale}")
        if not (np.isfinite(self.rotation).all() and np.isfinite(self.translation).all()):
            raise ShapeError("a similarity holds NaN or infinite values")

    def apply(self, points: Float64) -> Float64:
        """Source points [..., 3] to target points [..., 3]."""
        return self.scale * (points @ self.rotation.T) + self.translation

    def inverse(self) -> Similarity:
        """source_from_target."""
        return Similarity(
            scale=1.0 / self.scale,
            rotation=self.rotation.T.copy(),
            translation=-(self.rotation.T @ self.translation) / self.scale,
        )

    def after(self, first: Similarity) -> Similarity:
        """The transform that applies `first`, then this one."""
        return Similarity(
            scale=self.scale * first.scale,
            rotation=self.rotation @ first.rotation,
            translation=self.apply(first.translation),
        )


def spanned_dimensions(points: Float64) -> int:
    """How many dimensions the points [N, 3] span: 0 where all coincide, 1 on a line, 2 on a plane, 3 in space."""
    if len(points) == 0:
        return 0
    spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
    rounding = 1e-14 * np.sqrt(len(points)) * float(np.abs(points).max())
    return int((spread > max(rounding, _FLAT * float(spread[0]))).sum())


def align_similarity(source: Float64, target: Float64, *, collinear_ok: bool = False) -> Similarity:
    """The similarity that brings source points closest to target points in the least-squares sense.

    Args:
        source: [N, 3].
        target: [N, 3], row n corresponds to row n of `source`.
        collinear_ok: accept points on one line; the rotation about that line is then one of many equally good ones.

    Returns:
        target_from_source, never a reflection.

    Raises:
        ShapeError: fewer than three points, shapes that differ, values that are not finite, or points that coincide or
            (unless `collinear_ok`) lie on one line.
    """
    _check_points(source, target)
    least = 1 if collinear_ok else 2
    for name, points in (("source", source), ("target", target)):
        dimensions = spanned_dimensions(points)
        if dimensions < least:
            where = "coincide" if dimensions == 0 else "lie on one line"
            raise ShapeError(f"the {len(points)} {name} points {where}: they fix no similarity; give points apart")
    scale, rotation, translation = _umeyama(source[None], target[None])
    return Similarity(scale=float(scale[0]), rotation=rotation[0], translation=translation[0])


def align_similarity_robust(source: Float64, target: Float64, *, seed: int = 0) -> tuple[Similarity, NDArray[np.bool_]]:
    """Like `align_similarity` (points on a line accepted), but up to half of the points may be arbitrarily wrong.

    Args:
        source: [N, 3].
        target: [N, 3].
        seed: of the samples; the same seed gives the same result.

    Returns:
        target_from_source, and which points [N] it was fitted to. All of them where there are fewer than five: a
        sample of three fits always, so that it takes two further points to tell who is wrong.

    Raises:
        ShapeError: as `align_similarity`.
    """
    best = align_similarity(source, target, collinear_ok=True)
    count = len(source)
    if count < 5:
        return best, np.ones(count, dtype=np.bool_)
    generator = np.random.default_rng(seed)
    samples = np.array([generator.choice(count, 3, replace=False) for _ in range(_SAMPLES)])
    lowest = float(np.median(_residuals(best, source, target)))
    for scale, rotation, translation in zip(*_umeyama(source[samples], target[samples]), strict=True):
        if not 0.0 < scale < np.inf:
            continue
        candidate = Similarity(scale=float(scale), rotation=rotation, translation=translation)
        median = float(np.median(_residuals(candidate, source, target)))
        if median < lowest:
            best, lowest = candidate, median
    return _refit(best, source, target)


def _check_points(source: Float64, target: Float64) -> None:
    if source.ndim != 2 or source.shape[1:] != (3,) or source.shape != target.shape:
        raise ShapeError(f"source and target must both be [N, 3], not {source.shape} and {target.shape}")
    if len(source) < 3:
        raise ShapeError(f"a similarity needs at least three points, not {len(source)}")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ShapeError("the points of a similarity hold NaN or infinite values")


def _umeyama(source: Float64, target: Float64) -> tuple[Float64, Float64, Float64]:
    """Solve B problems [B, N, 3] at once: scales [B], rotations [B, 3, 3], translations [B, 3]."""
    mean_source, mean_target = source.mean(axis=1), target.mean(axis=1)  # [B, 3]
    from_source = source - mean_source[:, None]
    from_target = target - mean_target[:, None]
    covariance = np.einsum("bni,bnj->bij", from_target, from_source) / source.shape[1]
    left, singular, right = np.linalg.svd(covariance)
    signs = np.ones_like(singular)
    signs[:, 2] = np.where(np.linalg.det(left) * np.linalg.det(right) < 0, -1.0, 1.0)
    rotation = (left * signs[:, None]) @ right
    variance = (from_source**2).sum(axis=(1, 2)) / source.shape[1]
    # A sample of coinciding points has no scale; 0 marks it.
    spread = variance > np.finfo(np.float64).tiny
    scale = np.divide((singular * signs).sum(axis=1), variance, out=np.zeros_like(variance), where=spread)
    translation = mean_target - scale[:, None] * np.einsum("bij,bj->bi", rotation, mean_source)
    return scale, rotation, translation


def _residuals(similarity: Similarity, source: Float64, target: Float64) -> Float64:
    return np.asarray(np.linalg.norm(similarity.apply(source) - target, axis=1))


def _refit(best: Similarity, source: Float64, target: Float64) -> tuple[Similarity, NDArray[np.bool_]]:
    """Fit to the points within 2.5 robust standard deviations, until these no longer change."""
    count = len(source)
    rounding = 1e-10 * float(np.linalg.norm(target - target.mean(axis=0), axis=1).max())
    inliers = np.zeros(count, dtype=np.bool_)
    for _ in range(_REFITS):
        residuals = _residuals(best, source, target)
        # 1.4826 turns a median into a standard deviation; the bracket is Rousseeuw's correction for small samples.
        deviation = 1.4826 * (1.0 + 5.0 / (count - 3)) * float(np.median(residuals))
        chosen = residuals <= max(2.5 * deviation, rounding)
        if (chosen == inliers).all():
            break
        inliers = chosen
        if min(map(spanned_dimensions, (source[inliers], target[inliers]))) == 0:
            # All that agrees is one place: there is nothing to fit again.
            break
        best = align_similarity(source[inliers], target[inliers], collinear_ok=True)
    return best, inliers
