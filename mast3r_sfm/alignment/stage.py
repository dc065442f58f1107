"""The align stage: one frame per connected part of the verified view graph, and a pose in it for every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mast3r_sfm.alignment.edges import components, make_edges, spanning_tree
from mast3r_sfm.alignment.positions import RELIABLE_ANGLE, average_scales, depth_ratios, solve_positions
from mast3r_sfm.alignment.rotations import average_rotations, trust_by_triangles
from mast3r_sfm.config import AlignConfig
from mast3r_sfm.geometry.rigid import make_pose
from mast3r_sfm.types import AlignmentResult, Bool, Float64, Int32, PairMatches

CODE_VERSION = 1
BRIDGE_LEAD = 2.0
"""How many times the evidence of refuted pairs the only pair between two halves must have to be believed."""


def align(matches: Sequence[PairMatches], num_images: int, config: AlignConfig) -> list[AlignmentResult]:
    """Align the pairs of every connected part; largest part first.

    Parts are joined by pairs that carry a baseline. Pairs that contradict the whole are dropped, and the rest is
    aligned anew. Images that only a pure rotation ties to a part are left to be placed against its finished model.

    Args:
        matches: all edges of the view graph, verified or not.
        num_images: how many images the indices run over.
        config: thresholds.
    """
    usable = np.array([edge for edge, match in enumerate(matches) if match.verdict.has_depth], np.int32)
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
                results.append(replace(result, edges=inside))
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
    angle = np.array([_median_angle(match) for match in matches])
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
    )


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


def _median_angle(match: PairMatches) -> float:
    """Median angle in radians between the two rays of an edge's points."""
    turned = match.points_second @ match.second_from_first[:, :3]
    cosine = (match.points_first * turned).sum(axis=1)
    sine = np.linalg.norm(np.cross(match.points_first, turned), axis=1)
    return float(np.median(np.arctan2(sine, cosine)))


def _median_per_image(pairs: Int32, values: Float64, count: int) -> Float64:
    return np.array([float(np.median(values[(pairs == image).any(axis=1)])) for image in range(count)])
