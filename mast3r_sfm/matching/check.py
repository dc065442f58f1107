"""The uncalibrated two-view check: which putative matches agree with one epipolar geometry, and with one homography.

Works before any focal length is known. Pixels are network pixels with COLMAP's centre convention: thresholds then mean
the same for a phone photo of 48 megapixels and for a thumbnail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import poselib

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.epipolar import sampson_error
from mast3r_sfm.types import Bool, Float32, Float64, Int64, Verdict

MAX_ITERATIONS = 3000
MIN_ITERATIONS = 100
"""poselib's own 1,000 is ten times what a pair with many inliers needs."""
MIN_SAMPLE = 8
PLANAR_SHARE = 0.75
"""Share of the inliers on one homography from which a pair is taken to show one plane, or to be a mere turn. Measured:
at most 0.74 for nine tenths of the pairs of real scenes with depth, 0.76 and more for a rendered plane."""


@dataclass(frozen=True, kw_only=True)
class EpipolarEdge:
    """A pair after the uncalibrated check; network pixels."""

    first: int
    second: int
    xy_first: Float64
    """[M, 2] inliers only, best match first."""
    xy_second: Float64
    confidence: Float32
    """[M]."""
    is_distinct: Bool
    """[M]: the match had a say in the verdict."""
    points_first: Float64 | None
    """[M, 3] 3D points in the first camera's frame, of a link that a pointmap model found; else None."""
    points_second: Float64 | None
    fundamental: Float64
    """[3, 3] x₂ᵀ F x₁ = 0."""
    homography: Float64
    """[3, 3] x₂ ~ H x₁, of as many inliers as possible; zero where the pair is not verified."""
    homography_share: float
    """Share of the inliers that one homography explains as well."""
    num_putative: int
    """Distinct matches before the check."""
    verdict: Verdict
    """GOOD, WEAK or TOO_FEW; what kind of link a GOOD one is, is decided when focal lengths are known."""

    @property
    def is_flat(self) -> bool:
        """One homography explains it: a plane, or a camera that only turned."""
        return self.homography_share >= PLANAR_SHARE

    @property
    def num_inliers(self) -> int:
        """How many distinct matches agree with the geometry."""
        return int(self.is_distinct.sum())

    @property
    def inlier_ratio(self) -> float:
        """Share of the distinct matches that are inliers."""
        return self.num_inliers / max(self.num_putative, 1)


@dataclass(frozen=True, kw_only=True)
class Putative:
    """Matches of a pair before any check; network pixels."""

    xy_first: Float64
    xy_second: Float64
    confidence: Float32
    is_distinct: Bool
    """[M]: nothing else in the other image looks nearly as much alike. These decide whether the photos show the same
    place, and from where; the others are then believed where they agree."""
    points: Callable[[Int64], tuple[Float64, Float64]] | None = None
    """From a pointmap model, the 3D points of both views, [K, 3] each in its own camera's frame and both in one scale,
    of the matches with these numbers; made when they are asked for."""

    def subset(self, index: Int64 | Bool) -> Putative:
        """The matches that `index` (integers or a mask) picks, in its order."""
        points = self.points
        numbers = np.arange(len(self.xy_first))[index]
        return Putative(
            xy_first=self.xy_first[index],
            xy_second=self.xy_second[index],
            confidence=self.confidence[index],
            is_distinct=self.is_distinct[index],
            points=None if points is None else lambda chosen: points(numbers[chosen]),
        )


def min_significant_inliers(num_putative: int, config: MatchConfig) -> float:
    """Inliers below which an epipolar geometry is no evidence.

    Among N random matches, RANSAC finds a geometry that fits a share of them by chance: the more matches, the more.
    Of 1,300 pairs of photos of different places (benchmarks/chance_matches.py) 99 % stay below 18 + 0.12·N, and 8 reach
    beyond 20 + 0.12·N: those are left to the slow matcher and to alignment.
    """
    return config.min_inliers + config.chance_share * num_putative


def check_pair(pair: tuple[int, int], putative: Putative, config: MatchConfig, seed: int) -> EpipolarEdge:
    """Fit a fundamental matrix and a homography to the putative matches of a pair, robustly (LO-RANSAC of poselib).

    Args:
        pair: indices of the images.
        putative: matches in network pixels.
        config: thresholds.
        seed: of the sampling.
    """
    # The best matches first: progressive sampling draws from them first.
    ordered = putative.subset(np.argsort(-putative.confidence, kind="stable"))
    distinct = ordered.subset(ordered.is_distinct)
    count = len(distinct.xy_first)
    error = np.full(len(ordered.xy_first), np.inf)
    fundamental, homography, homography_share = np.zeros((3, 3)), np.zeros((3, 3)), 0.0
    if count >= MIN_SAMPLE:
        options = {
            "progressive_sampling": True,
            "max_iterations": MAX_ITERATIONS,
            "min_iterations": MIN_ITERATIONS,
            "seed": seed,
        }
        fundamental, _ = poselib.estimate_fundamental(
            distinct.xy_first, distinct.xy_second, {"max_epipolar_error": config.max_epipolar_error_px, **options}
        )
        error = sampson_error(fundamental, ordered.xy_first, ordered.xy_second)
    kept = ordered.subset(error < config.max_epipolar_error_px)
    enough = int(kept.is_distinct.sum()) >= min_significant_inliers(count, config)
    if enough:
        homography, info = poselib.estimate_homography(
            kept.xy_first, kept.xy_second, {"max_reproj_error": 1.5 * config.max_epipolar_error_px, **options}
        )
        homography_share = float(info["num_inliers"]) / len(kept.xy_first)
    points_first, points_second = None, None
    if enough and kept.points is not None:
        points_first, points_second = kept.points(np.arange(len(kept.xy_first)))
    verdict = Verdict.GOOD if enough else Verdict.WEAK if count >= config.min_inliers else Verdict.TOO_FEW
    return EpipolarEdge(
        first=pair[0],
        second=pair[1],
        xy_first=kept.xy_first,
        xy_second=kept.xy_second,
        confidence=kept.confidence,
        is_distinct=kept.is_distinct,
        points_first=points_first,
        points_second=points_second,
        fundamental=np.asarray(fundamental, np.float64),
        homography=np.asarray(homography, np.float64),
        homography_share=homography_share,
        num_putative=count,
        verdict=verdict,
    )
