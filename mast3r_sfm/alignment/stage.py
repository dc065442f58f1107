"""The align stage: one frame per connected part of the verified view graph, and a pose in it for every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mast3r_sfm.alignment.edges import components, make_edges, median_angle, spanning_tree
from mast3r_sfm.alignment.epipolar import EpipolarProblem, refine_poses
from mast3r_sfm.alignment.from_matches import problem_from_matches
from mast3r_sfm.alignment.known import in_known_frame, judge_pairs
from mast3r_sfm.alignment.pointmaps import PointmapAlignment, PointmapOptions, align_pointmaps
from mast3r_sfm.alignment.positions import RELIABLE_ANGLE, average_scales, depth_ratios, solve_positions
from mast3r_sfm.alignment.problem import PointmapProblem
from mast3r_sfm.alignment.rotations import average_rotations, trust_by_triangles
from mast3r_sfm.alignment.tree import TreeKind
from mast3r_sfm.colmap.lens import straighten_matches
from mast3r_sfm.config import AlignConfig
from mast3r_sfm.errors import ReconstructionError
from mast3r_sfm.geometry.known_poses import KnownPoses
from mast3r_sfm.geometry.rigid import angle_between_rotations, camera_centre, make_pose
from mast3r_sfm.types import AlignmentResult, Bool, Float64, Int32, PairMatches, Rig

CODE_VERSION = 6
MAX_FOCAL_CHANGE = 1.03
"""Factor up to which a pair's pose is the same with either focal length, next to its noise."""
BRIDGE_LEAD = 2.0
"""How many times the evidence of refuted pairs the only pair between two halves must have to be believed."""


@dataclass(frozen=True, kw_only=True)
class Pinholes:
    """The cameras with which pointmaps are aligned or, without them, poses and focal lengths are refined."""

    rig: Rig
    """Focal lengths that are not known are found anew."""
    pixel_scale: float
    """Photo pixels per pixel of what the model saw."""
    own_depth: bool = True
    """The points of the matches are the model's own rather than triangulated from the matches."""


def align(
    matches: Sequence[PairMatches],
    num_images: int,
    config: AlignConfig,
    pinholes: Pinholes | None = None,
    known: KnownPoses | None = None,
) -> list[AlignmentResult]:
    """Align the pairs of every connected part; largest part first, and before it what is in the frame of known poses.

    Parts are joined by pairs that carry a baseline. Pairs that contradict the whole are dropped, and the rest is
    aligned anew. Images that only a pure rotation ties to a part are left to be placed against its finished model.

    Args:
        matches: all edges of the view graph, verified or not.
        num_images: how many images the indices run over.
        config: thresholds.
        pinholes: the cameras; without them, the averages over the pairs are all that is looked for.
        known: poses of some images; pairs that contradict them are not used.
    """
    usable = np.array([edge for edge, match in enumerate(matches) if match.verdict.has_depth], np.int32)
    if known is None:
        return _align_all(matches, usable, num_images, config, pinholes)
    judged = judge_pairs(matches, known, config)
    usable = usable[~judged.contradicts[usable]]
    # Where nothing is left to be found, nothing is aligned.
    settled = known.is_fixed and len(known) == num_images
    parts = [] if settled else _align_all(matches, usable, num_images, config, pinholes)
    return in_known_frame(parts, matches, known, judged)


def _align_all(
    matches: Sequence[PairMatches], usable: Int32, num_images: int, config: AlignConfig, pinholes: Pinholes | None
) -> list[AlignmentResult]:
    """The parts that the usable edges connect, each in a frame of its own."""
    waiting = [usable]
    results: list[AlignmentResult] = []
    dropped: list[PairMatches] = []
    while waiting:
        candidates = waiting.pop()
        pairs = np.array([(matches[edge].first, matches[edge].second) for edge in candidates], np.int32).reshape(-1, 2)
        for part in components(num_images, pairs):
            if len(part) < config.min_images:
                continue
            inside = candidates[np.isin(pairs[:, 0], part)]
            kept, result = _align_part([matches[edge] for edge in inside], part, config)
            if result is not None:
                kept = ~_doubtful_bridges([matches[edge] for edge in inside], part, dropped)
            if result is None or not kept.all():
                dropped += [matches[edge] for edge in inside[~kept]]
                waiting.append(inside[kept])
            else:
                if pinholes is not None:
                    chosen = [matches[edge] for edge in inside]
                    if pinholes.own_depth:
                        result = _align_pointmaps(chosen, result, pinholes, config)
                    else:
                        result = _refine(chosen, result, pinholes)
                results.append(replace(result, edges=inside[result.edges]))
    return sorted(results, key=lambda result: (-len(result.images), int(result.images[0])))


def _align_part(matches: list[PairMatches], images: Int32, config: AlignConfig) -> tuple[Bool, AlignmentResult | None]:
    """Align one part, or say which of its edges to keep for another try."""
    edges = make_edges(matches, images)
    edges = replace(edges, weight=edges.weight * trust_by_triangles(edges))
    rotations, turn_error = average_rotations(edges)
    good = _best_first(turn_error / np.radians(config.max_rotation_error_deg))
    if not good.all():
        return good, None
    scales, group = average_scales(depth_ratios(matches), len(matches))
    angle = np.array([median_angle(match) for match in matches])
    centres, shift_error, history = solve_positions(edges, rotations, scales, group, angle)
    # The smaller the angle between the rays, the less the direction of a baseline is known.
    allowed = np.radians(config.max_direction_error_deg) * np.maximum(1.0, RELIABLE_ANGLE / np.maximum(angle, 1e-3))
    good = _best_first(shift_error / allowed)
    if not good.all():
        return good, None
    return good, AlignmentResult(
        images=images,
        edges=np.arange(len(matches), dtype=np.int32),
        cam_from_world=make_pose(rotations, -(rotations @ centres[:, :, None])[:, :, 0]),
        residual_deg=_median_per_image(edges.pairs, np.degrees(turn_error), len(images)),
        history=history,
        stop_reason=f"positions settled after {len(history)} steps",
        num_edges=_edges_per_image(edges.pairs, len(images)),
    )


def _align_pointmaps(
    matches: list[PairMatches], averaged: AlignmentResult, pinholes: Pinholes, config: AlignConfig
) -> AlignmentResult:
    """The part by its pointmaps, or as it was averaged where these do not hold it together."""
    stated = problem_from_matches(matches, averaged.images, pinholes.rig, pinholes.pixel_scale)
    if stated is None:
        return averaged
    problem, judged = stated
    aligned = _hold_together(problem, None if config.start == "averages" else TreeKind(config.start))
    if aligned is None:
        return averaged
    kept = ~judged  # what could not be compared has not been refuted either
    kept[judged] = aligned.kept
    steps = sum(len(course.history) - 1 for course in aligned.courses)
    poses = aligned.scene.cam_from_world
    baseline = _mean_baseline(poses, make_edges(matches, averaged.images).pairs[kept])
    return replace(
        _with_poses(averaged, matches, poses, kept),
        history=aligned.courses[-1].history,
        stop_reason=f"pointmaps settled after {steps} steps",
        focal_px=pinholes.pixel_scale * aligned.scene.focal_px[problem.camera_of_image],
        rotation_sigma_deg=aligned.deviations.rotation_deg,
        position_sigma=aligned.deviations.position / baseline,
    )


def _refine(matches: list[PairMatches], averaged: AlignmentResult, pinholes: Pinholes) -> AlignmentResult:
    """The part with the poses and focal lengths that agree best with all matches at once."""
    scale = pinholes.pixel_scale
    straight, rig = straighten_matches(matches, pinholes.rig)
    problem = EpipolarProblem.of(straight, averaged.images, rig, scale)
    focal = np.array([rig.cameras[rig.camera_of_image[image]].params[0] for image in averaged.images]) / scale
    refined = refine_poses(problem, averaged.cam_from_world, focal)
    return replace(
        _with_poses(averaged, matches, refined.cam_from_world, np.ones(len(matches), np.bool_)),
        history=refined.history,
        stop_reason=f"epipolar errors settled after {refined.steps} steps",
        focal_px=scale * refined.focal,
    )


def _with_poses(
    averaged: AlignmentResult, matches: list[PairMatches], cam_from_world: Float64, kept: Bool
) -> AlignmentResult:
    """The part with other poses, scaled to a mean baseline of 1, that rest on the edges `kept` [E]."""
    pairs = make_edges(matches, averaged.images).pairs
    rotation, first, second = cam_from_world[:, :, :3], pairs[:, 0], pairs[:, 1]
    turned = rotation[second] @ rotation[first].transpose(0, 2, 1)
    missed = angle_between_rotations(np.array([match.second_from_first[:, :3] for match in matches]), turned)
    return replace(
        averaged,
        edges=np.flatnonzero(kept).astype(np.int32),
        cam_from_world=make_pose(rotation, cam_from_world[:, :, 3] / _mean_baseline(cam_from_world, pairs[kept])),
        residual_deg=_median_per_image(pairs[kept], np.degrees(missed[kept]), len(averaged.images)),
        num_edges=_edges_per_image(pairs[kept], len(averaged.images)),
    )


def _mean_baseline(cam_from_world: Float64, pairs: Int32) -> float:
    centres = camera_centre(cam_from_world)
    return max(float(np.linalg.norm(centres[pairs[:, 1]] - centres[pairs[:, 0]], axis=1).mean()), 1e-12)


def _hold_together(problem: PointmapProblem, start: TreeKind | None) -> PointmapAlignment | None:
    """All images aligned, from averages or the tree asked for or, where these mislead, along the tree of most evidence.

    None where neither holds them all.
    """
    for tree in (start, TreeKind.MAXIMUM):
        try:
            aligned = align_pointmaps(problem, PointmapOptions(tree=tree))
        except ReconstructionError:
            continue
        if aligned.placed.all():
            return aligned
    return None


def with_focal_lengths(rig: Rig, parts: Sequence[AlignmentResult]) -> Rig:
    """The cameras with the focal lengths that the largest parts found, where they were not known."""
    cameras = list(rig.cameras)
    for part in reversed(parts):
        for image, focal in zip(part.images, part.focal_px, strict=False):
            number = int(rig.camera_of_image[image])
            if focal > 0 and not cameras[number].focal_is_known:
                params = cameras[number].params.copy()
                params[0] = focal
                cameras[number] = replace(cameras[number], params=params)
    return replace(rig, cameras=tuple(cameras))


def focal_lengths_moved(before: Rig, after: Rig) -> bool:
    """Whether any camera's focal length differs by so much that pairs deserve to be calibrated anew."""
    pairs = zip(before.cameras, after.cameras, strict=True)
    return any(abs(np.log(after.params[0] / before.params[0])) > np.log(MAX_FOCAL_CHANGE) for before, after in pairs)


def agreeing_matches(parts: Sequence[AlignmentResult], matches: Sequence[PairMatches]) -> int:
    """How many matches the pairs have that agree with the parts in which they stand."""
    return sum(len(matches[edge]) for part in parts for edge in part.edges)


def _doubtful_bridges(matches: list[PairMatches], images: Int32, dropped: list[PairMatches]) -> Bool:
    """Which edges [E] alone join two halves of a part, where edges as good between the same halves had to be dropped.

    The last of several contradicting edges is contradicted by nothing any more; that does not make it right.
    """
    inside = set(images.tolist())
    refuted = make_edges([match for match in dropped if inside.issuperset((match.first, match.second))], images)
    edges = make_edges(matches, images)
    doubtful = np.zeros(len(matches), bool)
    if not len(refuted.pairs):
        return doubtful
    for _, _, edge in spanning_tree(edges):
        halves = components(len(images), np.delete(edges.pairs, edge, axis=0))
        if len(halves) > 1:
            across = np.isin(refuted.pairs[:, 0], halves[0]) != np.isin(refuted.pairs[:, 1], halves[0])
            doubtful[edge] = float(edges.weight[edge]) < BRIDGE_LEAD * float(refuted.weight[across].max(initial=0.0))
    return doubtful


def _best_first(excess: Float64) -> Bool:
    """Which edges to keep, by error over what is allowed: the worst go first, since the others may be their fault."""
    return np.asarray(excess <= max(1.0, float(excess.max()) / 3), np.bool_)


def _median_per_image(pairs: Int32, values: Float64, count: int) -> Float64:
    return np.array([float(np.median(values[(pairs == image).any(axis=1)])) for image in range(count)])


def _edges_per_image(pairs: Int32, count: int) -> Int32:
    return np.bincount(pairs.ravel(), minlength=count).astype(np.int32)
