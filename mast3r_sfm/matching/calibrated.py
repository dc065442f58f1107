"""The second half of the two-view check, once focal lengths are known: relative pose, points, and the kind of link."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import poselib

from mast3r_sfm.colmap.lens import Lens
from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.epipolar import rays, rotation_between, sampson_error, triangulate
from mast3r_sfm.geometry.similarity import align_similarity_robust, spanned_dimensions
from mast3r_sfm.matching.check import EpipolarEdge, Pinhole, fundamental_between, min_significant_inliers
from mast3r_sfm.matching.straight import bend
from mast3r_sfm.types import Bool, Float32, Float64, Int64, PairMatches, Verdict

TURN_SHARE = 0.85
"""A turn about one centre that explains this share of what the best homography explains is called a pure rotation."""
SAMPLED_MATCHES = 300
"""The best matches, on which the pose is searched; it is then refined on all of them. Those of a pointmap are picked
evenly from best to worst instead: its best ones lie side by side, and say little about the pose."""
MIN_ITERATIONS, MAX_ITERATIONS = 50, 300


@dataclass(frozen=True, kw_only=True)
class View:
    """What the calibrated check needs to know of one image."""

    focal_px: float
    """In network pixels."""
    centre_px: Float64
    """[2] principal point in network pixels."""
    scale: float
    """Photo pixels per network pixel."""
    lens: Lens | None = None
    """Of a camera that is known; the network pixels of its edges are straight ones."""

    def photo_xy(self, xy: Float64) -> Float64:
        """Network pixels [M, 2] of an edge to photo pixels [M, 2]."""
        return self.scale * (xy if self.lens is None else bend(self.lens, xy, self.scale))

    def rays(self, xy: Float64) -> Float64:
        """Unit viewing directions of network pixels."""
        return rays(xy, self.focal_px, self.centre_px)

    @property
    def pinhole(self) -> Pinhole:
        """The camera in network pixels."""
        return Pinhole(focal_px=self.focal_px, centre_px=self.centre_px)


def calibrate_pair(edge: EpipolarEdge, first: View, second: View, config: MatchConfig, seed: int) -> PairMatches:
    """Relative pose and points of a checked pair, and what kind of link it is.

    Args:
        edge: result of the uncalibrated check.
        first: intrinsics of the first image.
        second: intrinsics of the second image.
        config: thresholds.
        seed: of the sampling.
    """
    if not edge.verdict.is_link:
        return _without_depth(edge, edge.verdict, np.zeros(0, np.int64), first, second)
    rays_first, rays_second = first.rays(edge.xy_first), second.rays(edge.xy_second)
    focal = (first.focal_px + second.focal_px) / 2
    if edge.is_flat:
        rotation, error = _turn(rays_first, rays_second)
        turned = error * focal < 1.5 * config.max_epipolar_error_px
        if turned.mean() >= TURN_SHARE * edge.homography_share:
            pose = np.concatenate([rotation, np.zeros((3, 1))], axis=1)
            rotating = _without_depth(edge, Verdict.PURE_ROTATION, np.flatnonzero(turned), first, second)
            return replace(rotating, second_from_first=pose)
    pose, inliers = _relative_pose(edge, first, second, config, seed)
    points, angle = triangulate(pose, rays_first, rays_second)
    points_second = points @ pose[:, :3].T + pose[:, 3]
    # Rays that are parallel to within the noise of a pixel have no depth worth keeping, whatever side they meet on.
    noise = config.max_epipolar_error_px / focal
    keep = np.flatnonzero(inliers & (points[:, 2] > 0) & (points_second[:, 2] > 0) & (angle > noise / 4))
    if int(edge.is_distinct[keep].sum()) < min_significant_inliers(edge.num_putative, config):
        return _without_depth(edge, Verdict.WEAK, np.zeros(0, np.int64), first, second)
    if edge.points_first is not None and edge.points_second is not None:
        # A pointmap model brings its own depth, better than two rays at a small angle.
        points, points_second = edge.points_first, edge.points_second
        if min(spanned_dimensions(points[keep]), spanned_dimensions(points_second[keep])) < 2:
            # One place or one line: they fix no pose.
            return _without_depth(edge, Verdict.WEAK, np.zeros(0, np.int64), first, second)
        fit, _ = align_similarity_robust(points[keep], points_second[keep], seed=seed)
        pose = np.concatenate([fit.rotation, fit.translation[:, None] / fit.scale], axis=1)
    return PairMatches(
        first=edge.first,
        second=edge.second,
        xy_first=first.photo_xy(edge.xy_first[keep]),
        xy_second=second.photo_xy(edge.xy_second[keep]),
        confidence=edge.confidence[keep],
        points_first=points[keep],
        points_second=points_second[keep],
        verdict=Verdict.PLANAR if edge.is_flat else Verdict.GOOD,
        inlier_ratio=edge.inlier_ratio,
        second_from_first=pose,
        decode_disagreement_deg=edge.decode_disagreement_deg,
    )


def _relative_pose(
    edge: EpipolarEdge, first: View, second: View, config: MatchConfig, seed: int
) -> tuple[Float64, Bool]:
    cameras = first.pinhole.poselib_camera(), second.pinhole.poselib_camera()
    few = edge.judged(SAMPLED_MATCHES)
    options = {
        "max_epipolar_error": config.max_epipolar_error_px,
        "min_iterations": MIN_ITERATIONS,
        "max_iterations": MAX_ITERATIONS,
        "seed": seed,
    }
    pose, _ = poselib.estimate_relative_pose(*few, *cameras, options)
    loss = {"loss_type": "CAUCHY", "loss_scale": config.max_epipolar_error_px / 2}
    pose, _ = poselib.refine_relative_pose(edge.xy_first, edge.xy_second, pose, *cameras, loss)
    translation = np.asarray(pose.t, np.float64)
    # A translation of zero length would be a pure rotation, which the caller has ruled out.
    translation = translation / max(float(np.linalg.norm(translation)), 1e-12)
    fundamental = fundamental_between(first.pinhole, second.pinhole, pose.R, translation)
    inliers = sampson_error(fundamental, edge.xy_first, edge.xy_second) < config.max_epipolar_error_px
    return np.concatenate([pose.R, translation[:, None]], axis=1), inliers


def _turn(rays_first: Float64, rays_second: Float64) -> tuple[Float64, Float64]:
    """The rotation that explains most rays, and the angle in radians [M] by which it misses each."""
    chosen = np.ones(len(rays_first), bool)
    for _ in range(3):
        rotation = rotation_between(rays_first[chosen], rays_second[chosen])
        error = np.linalg.norm(np.cross(rays_first @ rotation.T, rays_second), axis=1)
        chosen = error <= max(3 * float(np.median(error)), 1e-9)
    return rotation, error


def _without_depth(edge: EpipolarEdge, verdict: Verdict, keep: Int64, first: View, second: View) -> PairMatches:
    none: Float64 = np.zeros((0, 3))
    confidence: Float32 = edge.confidence[keep]
    return PairMatches(
        first=edge.first,
        second=edge.second,
        xy_first=first.photo_xy(edge.xy_first[keep]),
        xy_second=second.photo_xy(edge.xy_second[keep]),
        confidence=confidence,
        points_first=none,
        points_second=none,
        verdict=verdict,
        inlier_ratio=edge.inlier_ratio,
        decode_disagreement_deg=edge.decode_disagreement_deg,
    )
