"""The uncalibrated two-view check: which putative matches agree with one epipolar geometry, and with one homography.

Works before any focal length is known. Pixels are network pixels with COLMAP's centre convention: thresholds then mean
the same for a phone photo of 48 megapixels and for a thumbnail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import poselib

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.epipolar import sampson_error
from mast3r_sfm.matching.overlay import in_border, overlay_matches
from mast3r_sfm.types import Bool, Float32, Float64, Int64, Verdict

MAX_ITERATIONS = 3000
MIN_ITERATIONS = 100
"""poselib's own 1,000 is ten times what a pair with many inliers needs."""
HOMOGRAPHY_ITERATIONS = 500
"""One that PLANAR_SHARE of the matches agree with is found in 30; how many agree with any other does not matter."""
MIN_SAMPLE = 8
MAX_REJECTED = 300
CROWD, MAX_CROWD = 3.0, 600
"""How many matches a geometry is fitted to for each distinct one, and no more than so many unless all are distinct.
What is not distinct is wrong more often than not, but where it is wrong it agrees with nothing. Where few are distinct,
a wrong geometry has more of them than the true one in every third pair (internet photos, wide baselines); with three
times as many, in every eighth."""
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
    """Distinct matches that were judged: those dropped as an overlay's do not count."""
    verdict: Verdict
    """GOOD, WEAK, TOO_FEW or WATERMARK; what kind of link a GOOD one is, is decided when focal lengths are known."""
    rejected: Float32
    """[R, 5] distinct matches of keypoints that do not agree: x and y in both images, confidence; the best
    MAX_REJECTED."""
    decode_disagreement_deg: float = 0.0
    """Of a pointmap model, the angle by which the rotations of its two decodes differ, where the epipolar geometry
    stands; otherwise, and of a keypoint model, 0."""

    @property
    def is_flat(self) -> bool:
        """One homography explains it: a plane, or a camera that only turned."""
        return self.homography_share >= PLANAR_SHARE

    def judged(self, most: int) -> tuple[Float64, Float64]:
        """[M, 2] the distinct matches of both images, those that do not agree among them, and of these the best.

        Of a pointmap, they are picked evenly from best to worst instead: its best ones lie side by side.
        """
        xy = np.concatenate([self.xy_first, self.xy_second], axis=1)[self.is_distinct]
        if self.points_first is not None:
            chosen = np.linspace(0, len(xy) - 1, min(len(xy), most)).astype(np.int64)
        else:
            xy = np.concatenate([xy, self.rejected[:, :4]])
            confidence = np.concatenate([self.confidence[self.is_distinct], self.rejected[:, 4]])
            chosen = np.argsort(-confidence, kind="stable")[:most]
        return np.ascontiguousarray(xy[chosen, :2]), np.ascontiguousarray(xy[chosen, 2:])

    @property
    def num_inliers(self) -> int:
        """How many distinct matches agree with the geometry."""
        return int(self.is_distinct.sum())

    @property
    def inlier_ratio(self) -> float:
        """Share of the distinct matches that are inliers."""
        return self.num_inliers / max(self.num_putative, 1)


@dataclass(frozen=True, kw_only=True)
class MatchedPoints:
    """What a pointmap model says of K matches of a pair."""

    first: Float64
    """[K, 3] in the first camera's frame."""
    second: Float64
    """[K, 3] in the second camera's frame, in the scale of `first`."""
    decode_disagreement_deg: float
    """See `decodes.decode_disagreement_deg`."""


@dataclass(frozen=True, kw_only=True)
class Pinhole:
    """A known camera without distortion."""

    focal_px: float
    centre_px: Float64
    """[2]."""

    @property
    def matrix(self) -> Float64:
        """[3, 3]."""
        x, y = self.centre_px.tolist()
        return np.array([[self.focal_px, 0.0, x], [0.0, self.focal_px, y], [0.0, 0.0, 1.0]])

    def poselib_camera(self) -> dict[str, object]:
        """The same as poselib takes it."""
        width, height = (2 * self.centre_px).tolist()
        params = [self.focal_px, *self.centre_px.tolist()]
        return {"model": "SIMPLE_PINHOLE", "width": round(width), "height": round(height), "params": params}


def fundamental_between(first: Pinhole, second: Pinhole, rotation: Float64, translation: Float64) -> Float64:
    """[3, 3] of two cameras, by the pose of the second from the first: a rotation [3, 3] and a translation [3]."""
    essential = np.cross(np.asarray(translation, np.float64), rotation, axisb=0, axisc=0)
    return np.asarray(np.linalg.inv(second.matrix).T @ essential @ np.linalg.inv(first.matrix), np.float64)


@dataclass(frozen=True, kw_only=True)
class Putative:
    """Matches of a pair before any check; network pixels."""

    xy_first: Float64
    xy_second: Float64
    confidence: Float32
    is_distinct: Bool
    """[M]: nothing else in the other image looks nearly as much alike. These decide whether the photos show the same
    place, and from where; the others are then believed where they agree."""
    points: Callable[[Int64], MatchedPoints] | None = None
    """From a pointmap model, the points of the K matches with these numbers; made when they are asked for."""
    frames: tuple[Float64, Float64] | None = None
    """What each image shows, [2, 2]: its first and its last corner. None: overlays are not looked for."""
    cameras: tuple[Pinhole, Pinhole] | None = None
    """Of both images, in network pixels, where both are known."""

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
            frames=self.frames,
            cameras=self.cameras,
        )


def min_significant_inliers(num_putative: int, config: MatchConfig) -> float:
    """Distinct inliers below which an epipolar geometry is no evidence.

    Among N distinct random matches, RANSAC finds a geometry that fits a share of them by chance: the more matches, the
    more. Of 1,300 pairs of photos of different places, none has more than 16 and none more than 11 + 0.12·N, by XFeat's
    keypoints, by SIFT's or by both (as benchmarks/chance_matches.py measures).
    """
    return config.min_inliers + config.chance_share * num_putative


def check_pair(
    pair: tuple[int, int], putative: Putative, config: MatchConfig, seed: int, crowd: float = CROWD
) -> EpipolarEdge:
    """Fit a fundamental matrix and a homography to the putative matches of a pair, robustly (LO-RANSAC of poselib).

    What seems to lie on an overlay is put aside first. Where nothing stands without it, the verdict is WATERMARK.
    Where a geometry stands, matches inside the border come back as far as they agree with it: a far background, too,
    stands still while a camera moves, and so does what lies straight ahead.

    Args:
        pair: indices of the images.
        putative: matches in network pixels.
        config: thresholds.
        seed: of the sampling.
        crowd: how many matches the geometry is fitted to for each distinct one.
    """
    # The best matches first: progressive sampling draws from them first.
    judged = putative.subset(np.argsort(-putative.confidence, kind="stable"))
    overlay = np.zeros(len(judged.xy_first), np.bool_)
    if judged.frames is not None:
        overlay = overlay_matches(judged.xy_first, judged.xy_second, judged.frames)
    everything, judged = judged, judged.subset(~overlay)
    fundamental, kept = _fit_fundamental(judged, config, seed, crowd)
    stands = _stands(judged, kept, config)
    if stands and overlay.any() and judged.frames is not None:
        error = sampson_error(fundamental, everything.xy_first, everything.xy_second)
        inside = ~in_border(everything.xy_first, judged.frames[0])
        judged = everything.subset(~overlay | (inside & (error < config.max_epipolar_error_px)))
        fundamental, kept = _fit_fundamental(judged, config, seed, crowd)
        stands = _stands(judged, kept, config)
    count = int(judged.is_distinct.sum())
    edge = EpipolarEdge(
        first=pair[0],
        second=pair[1],
        xy_first=kept.xy_first,
        xy_second=kept.xy_second,
        confidence=kept.confidence,
        is_distinct=kept.is_distinct,
        points_first=None,
        points_second=None,
        fundamental=fundamental,
        homography=np.zeros((3, 3)),
        homography_share=0.0,
        num_putative=count,
        rejected=_rejected(judged, fundamental, config),
        verdict=Verdict.WEAK if count >= config.min_inliers else Verdict.TOO_FEW,
    )
    if stands:
        return _as_link(edge, kept, config, seed)
    return replace(edge, verdict=Verdict.WATERMARK) if overlay.any() else edge


def _rejected(judged: Putative, fundamental: Float64, config: MatchConfig) -> Float32:
    if judged.points is not None:
        return np.zeros((0, 5), np.float32)
    error = sampson_error(fundamental, judged.xy_first, judged.xy_second)
    others = judged.subset(judged.is_distinct & ~(error < config.max_epipolar_error_px))
    rows = np.concatenate([others.xy_first, others.xy_second, others.confidence[:, None]], axis=1)
    return rows[:MAX_REJECTED].astype(np.float32)


def _stands(judged: Putative, kept: Putative, config: MatchConfig) -> bool:
    return int(kept.is_distinct.sum()) >= min_significant_inliers(int(judged.is_distinct.sum()), config)


def _fit_fundamental(judged: Putative, config: MatchConfig, seed: int, crowd: float) -> tuple[Float64, Putative]:
    """[3, 3] the fundamental matrix of the best matches, zero for too few, and all matches that agree with it.

    Where both cameras are known, it is the one that an essential matrix makes with them.
    """
    count = int(judged.is_distinct.sum())
    fitted = max(min(int(crowd * count), MAX_CROWD), count)
    # The distinct ones come first; they are the best of each kind of keypoints.
    best = judged.subset(np.argsort(~judged.is_distinct, kind="stable")[:fitted])
    if count < MIN_SAMPLE:
        return np.zeros((3, 3)), judged.subset(np.zeros(len(judged.xy_first), np.bool_))
    options = {"max_epipolar_error": config.max_epipolar_error_px, **_ransac(judged, seed)}
    if judged.cameras is None:
        fundamental, _ = poselib.estimate_fundamental(best.xy_first, best.xy_second, options)
    else:
        # Five matches instead of seven, and planes, on which a fundamental matrix is arbitrary, are no exception.
        first, second = judged.cameras
        cameras = first.poselib_camera(), second.poselib_camera()
        pose, _ = poselib.estimate_relative_pose(best.xy_first, best.xy_second, *cameras, options)
        fundamental = fundamental_between(first, second, pose.R, pose.t)
    error = sampson_error(fundamental, judged.xy_first, judged.xy_second)
    return np.asarray(fundamental, np.float64), judged.subset(error < config.max_epipolar_error_px)


def _as_link(edge: EpipolarEdge, kept: Putative, config: MatchConfig, seed: int) -> EpipolarEdge:
    """The edge with its homography and points; WEAK where the decodes that the points come from disagree."""
    options = _ransac(kept, seed) | {"max_iterations": HOMOGRAPHY_ITERATIONS}
    homography, info = poselib.estimate_homography(
        kept.xy_first, kept.xy_second, {"max_reproj_error": 1.5 * config.max_epipolar_error_px, **options}
    )
    share = float(info["num_inliers"]) / len(kept.xy_first)
    link = replace(edge, verdict=Verdict.GOOD, homography=np.asarray(homography, np.float64), homography_share=share)
    if kept.points is None:
        return link
    points = kept.points(np.arange(len(kept.xy_first)))
    link = replace(link, decode_disagreement_deg=points.decode_disagreement_deg)
    if points.decode_disagreement_deg > config.max_decode_disagreement_deg:
        return replace(link, verdict=Verdict.WEAK)
    return replace(link, points_first=points.first, points_second=points.second)


def _ransac(matches: Putative, seed: int) -> dict[str, object]:
    return {
        # The confidence of a pointmap changes from place to place: its best matches lie side by side, and the geometry
        # that they lead to holds there alone.
        "progressive_sampling": matches.points is None,
        "max_iterations": MAX_ITERATIONS,
        "min_iterations": MIN_ITERATIONS,
        "seed": seed,
    }
