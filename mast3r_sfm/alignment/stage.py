"""The align stage: one frame per connected part of the verified view graph, and a pose in it for every image it holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mast3r_sfm.alignment.edges import components, make_edges
from mast3r_sfm.alignment.positions import average_scales, depth_ratios, solve_positions
from mast3r_sfm.alignment.rotations import average_rotations
from mast3r_sfm.config import AlignConfig
from mast3r_sfm.geometry.rigid import make_pose
from mast3r_sfm.types import AlignmentResult, Float64, Int32, PairMatches

CODE_VERSION = 1


def align(matches: Sequence[PairMatches], num_images: int, config: AlignConfig) -> list[AlignmentResult]:
    """Align the pairs of every connected part; largest part first.

    Parts are joined by pairs that carry a baseline. Images that only a pure rotation ties to a part are left to be
    placed against its finished model.

    Args:
        matches: all edges of the view graph, verified or not.
        num_images: how many images the indices run over.
        config: thresholds.
    """
    waiting = [[match for match in matches if match.verdict.has_depth]]
    results: list[AlignmentResult] = []
    while waiting:
        edges = waiting.pop()
        pairs = np.array([(match.first, match.second) for match in edges], np.int32).reshape(-1, 2)
        for part in components(num_images, pairs):
            if len(part) < config.min_images:
                continue
            members = set(part.tolist())
            mine = [match for match in edges if match.first in members]
            kept, result = _align_part(mine, part, np.radians(config.max_rotation_error_deg))
            if result is None:
                waiting.append(kept)
            else:
                results.append(result)
    return sorted(results, key=lambda result: (-len(result.images), int(result.images[0])))


def _align_part(
    matches: list[PairMatches], images: Int32, max_error: float
) -> tuple[list[PairMatches], AlignmentResult | None]:
    """Align one part, or give back the edges that agree with each other where others had to be dropped."""
    edges = make_edges(matches, images)
    rotations, error = average_rotations(edges)
    if (error > max_error).any():
        return [match for match, bad in zip(matches, error > max_error, strict=True) if not bad], None
    scales, group = average_scales(depth_ratios(matches), len(matches))
    angle = np.array([_median_angle(match) for match in matches])
    centres, history = solve_positions(edges, rotations, scales, group, angle)
    result = AlignmentResult(
        images=images,
        cam_from_world=make_pose(rotations, -(rotations @ centres[:, :, None])[:, :, 0]),
        residual_deg=_median_per_image(edges.pairs, np.degrees(error), len(images)),
        history=history,
        stop_reason=f"positions settled after {len(history)} steps",
    )
    return matches, result


def _median_angle(match: PairMatches) -> float:
    """Median angle in radians between the two rays of an edge's points."""
    turned = match.points_second @ match.second_from_first[:, :3]
    cosine = (match.points_first * turned).sum(axis=1)
    sine = np.linalg.norm(np.cross(match.points_first, turned), axis=1)
    return float(np.median(np.arctan2(sine, cosine)))


def _median_per_image(pairs: Int32, values: Float64, count: int) -> Float64:
    return np.array([float(np.median(values[(pairs == image).any(axis=1)])) for image in range(count)])
