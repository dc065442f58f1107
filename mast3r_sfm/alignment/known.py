"""Known poses in the alignment: pairs that contradict them, and parts brought into their frame.

Two images of known pose say how their pair must look. A part that holds two of them has the frame and scale of all
others, so that parts which nothing else joins are one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mast3r_sfm.alignment.edges import median_angle
from mast3r_sfm.alignment.positions import RELIABLE_ANGLE
from mast3r_sfm.colmap.lens import straighten_matches
from mast3r_sfm.config import AlignConfig
from mast3r_sfm.errors import InputError
from mast3r_sfm.geometry.epipolar import sampson_error
from mast3r_sfm.geometry.known_poses import KnownPoses, moved_poses, similarity_between_poses
from mast3r_sfm.geometry.rigid import angle_between_rotations
from mast3r_sfm.progress import Progress
from mast3r_sfm.types import AlignmentResult, Bool, Float64, Int32, PairMatches, Rig

MAX_MISFIT = 0.5
"""Share of the matches of the middle pair that may miss fixed poses before these are doubted."""
PER_IMAGE = ("focal_px", "num_edges", "rotation_sigma_deg", "position_sigma")
"""What an alignment may say of each of its images."""
MIN_JUDGED = 3
"""Pairs that must all contradict the known poses for these to be refused."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the known poses say of all edges."""

    known: Bool
    """[E] both poses are known, and the pair has one."""
    contradicts: Bool
    """[E] and its pose is not the one between them."""
    rotation_error_deg: Float64
    """[E] 0 where not known."""


def judge_pairs(matches: Sequence[PairMatches], poses: KnownPoses, config: AlignConfig) -> Judged:
    """Compare every verified pair of two known images with their poses, by the bounds of alignment."""
    known, contradicts = np.zeros(len(matches), np.bool_), np.zeros(len(matches), np.bool_)
    rotation_error = np.zeros(len(matches))
    for edge, match in enumerate(matches):
        between = poses.relative(match.first, match.second) if match.verdict.has_depth else None
        if between is None:
            continue
        known[edge] = True
        pose = match.second_from_first
        rotation_error[edge] = np.degrees(angle_between_rotations(pose[:, :3], between[:, :3]))
        one, two = pose[:, 3], between[:, 3]
        direction = np.degrees(np.arctan2(np.linalg.norm(np.cross(one, two)), one @ two))
        # The smaller the angle between the rays, the less the direction of a baseline is known.
        allowed = config.max_direction_error_deg * max(1.0, RELIABLE_ANGLE / max(median_angle(match), 1e-3))
        contradicts[edge] = rotation_error[edge] > config.max_rotation_error_deg or direction > allowed
    return Judged(known=known, contradicts=contradicts, rotation_error_deg=rotation_error)


def report_contradictions(judged: Judged, progress: Progress) -> None:
    """Say how far the pairs bear out the known poses.

    Raises:
        InputError: none of several pairs does.
    """
    total, bad = int(judged.known.sum()), int(judged.contradicts.sum())
    if not bad:
        return
    median = float(np.median(judged.rotation_error_deg[judged.known]))
    said = f"{bad} of {total} verified pairs between photos with known poses contradict these poses"
    hint = (
        "are they of these photos, from world to camera (x_cam = R x_world + t), with x right, y down and z forward? "
        "Without --poses they are found; with --poses-prior they may be approximate"
    )
    if bad == total and total >= MIN_JUDGED:
        raise InputError(f"{said} (median error of rotations {median:.1f}°): {hint}")
    if 2 * bad > total:
        progress.warn(
            f"{said} (median error of rotations {median:.1f}°), so that most photos speak against them; {hint}"
        )
    else:
        progress.note(f"{said}, and were not used")


def report_misfit(
    matches: Sequence[PairMatches], poses: KnownPoses, rig: Rig, limit_px: float, progress: Progress
) -> None:
    """Warn where fixed poses are near enough not to contradict the pairs, and too far off for most of their matches.

    Args:
        matches: all edges.
        poses: fixed ones.
        rig: cameras.
        limit_px: photo pixels within which all matches of a pair agree with each other.
        progress: told.
    """
    straight, pinholes = straighten_matches(matches, rig)
    missed = []
    for match in straight:
        between = poses.relative(match.first, match.second) if match.verdict.has_depth else None
        if between is not None:
            inverse = [np.linalg.inv(_matrix(pinholes, image)) for image in (match.first, match.second)]
            fundamental = inverse[1].T @ np.cross(between[:, 3], between[:, :3], axisb=0, axisc=0) @ inverse[0]
            missed.append(float((sampson_error(fundamental, match.xy_first, match.xy_second) > limit_px).mean()))
    if missed and float(np.median(missed)) > MAX_MISFIT:
        progress.warn(
            f"the known poses fit the photos badly: in {len(missed)} verified pairs, {np.median(missed):.0%} of the "
            f"matches (median) miss them by more than the {limit_px:.1f} pixels within which they agree with each "
            "other; poses that are only approximate are given with --poses-prior, and known cameras with --intrinsics"
        )


def _matrix(rig: Rig, image: int) -> Float64:
    focal, x, y = rig.cameras[rig.camera_of_image[image]].params[:3].tolist()
    return np.array([[focal, 0.0, x], [0.0, focal, y], [0.0, 0.0, 1.0]])


def in_known_frame(
    parts: Sequence[AlignmentResult], matches: Sequence[PairMatches], poses: KnownPoses, judged: Judged
) -> list[AlignmentResult]:
    """The parts, largest first, with all that hold two known images as one, in the frame of the known poses.

    Fixed poses are in it as they are, those too that no pair holds. An image of known pose that holds its part alone
    joins it without the others, which have no scale there; unless it is the only one.
    """
    rows = [poses.rows(part.images) for part in parts]
    count = [int(known.sum()) for _, known in rows]
    enough = [number >= 2 for number in count]
    if not any(enough) and 1 in count and not (poses.is_fixed and len(poses) > 1):
        enough[count.index(1)] = True
    placed: dict[int, Float64] = {}
    edges: set[int] = set()
    for part, (row, known), use in zip(parts, rows, enough, strict=True):
        if use:
            found = part.cam_from_world[known]
            moved = moved_poses(part.cam_from_world, similarity_between_poses(found, poses.cam_from_world[row[known]]))
            placed |= dict(zip(part.images.tolist(), moved, strict=True))
            edges |= set(part.edges.tolist())
    if poses.is_fixed:
        placed |= dict(zip(poses.images.tolist(), poses.cam_from_world, strict=True))
        edges |= set(np.flatnonzero(judged.known & ~judged.contradicts).tolist())
    if len(placed) < 2:
        return list(parts)
    joined = [part for part, use in zip(parts, enough, strict=True) if use]
    others = [
        kept
        for part, use in zip(parts, enough, strict=True)
        if not use and (kept := _without(part, matches, set(placed))) is not None
    ]
    return [_one_part(joined, placed, edges, matches), *others]


def _one_part(
    joined: Sequence[AlignmentResult], placed: dict[int, Float64], edges: set[int], matches: Sequence[PairMatches]
) -> AlignmentResult:
    images = np.array(sorted(placed), np.int32)
    ends = Counter(image for edge in edges for image in (matches[edge].first, matches[edge].second))
    residual = {int(i): float(r) for part in joined for i, r in zip(part.images, part.residual_deg, strict=True)}
    focal = {int(i): float(f) for part in joined for i, f in zip(part.images, part.focal_px, strict=False)}
    return AlignmentResult(
        images=images,
        edges=np.array(sorted(edges), np.int32),
        cam_from_world=np.array([placed[image] for image in images.tolist()]),
        residual_deg=np.array([residual.get(image, 0.0) for image in images.tolist()]),
        history=joined[0].history if joined else (),
        stop_reason=joined[0].stop_reason if joined else "all poses are known",
        focal_px=np.array([focal.get(image, 0.0) for image in images.tolist()]) if focal else np.zeros(0),
        num_edges=np.array([ends[image] for image in images.tolist()], np.int32),
    )


def _without(part: AlignmentResult, matches: Sequence[PairMatches], placed: set[int]) -> AlignmentResult | None:
    """A part less the images that stand elsewhere; None where nothing is left of it."""
    stays = np.array([image not in placed for image in part.images.tolist()], np.bool_)
    if stays.all():
        return part
    if stays.sum() < 2:
        return None
    left: Int32 = part.images[stays]
    inside = [matches[edge].first in left and matches[edge].second in left for edge in part.edges.tolist()]
    return replace(
        part,
        images=left,
        edges=part.edges[np.array(inside, np.bool_)],
        cam_from_world=part.cam_from_world[stays],
        residual_deg=part.residual_deg[stays],
        **{name: value[stays] for name in PER_IMAGE if len(value := getattr(part, name))},
    )
