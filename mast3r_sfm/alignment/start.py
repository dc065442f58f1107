"""Where the alignment of pointmaps starts: similarities of single edges, averaged over the whole graph.

Each edge gives the similarity between its two canonical views (Umeyama, 1991, re-weighted). Rotations are averaged over
all edges, then the logarithms of scales, then positions: each is a robust average of differences over the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse.linalg import splu

from mast3r_sfm.alignment.edges import EdgeSet
from mast3r_sfm.alignment.problem import Batch, PointmapProblem, Scene, camera_points, make_batches
from mast3r_sfm.alignment.rotations import average_rotations, graph_laplacian, trust_by_triangles
from mast3r_sfm.alignment.tree import TreeKind, kinematic_trees, saturating_score
from mast3r_sfm.geometry.rigid import make_pose
from mast3r_sfm.types import Bool, Float64

KERNELS = (1.0, 0.5, 0.25, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05)
"""Relative errors of 3D points at which a match loses half of its weight, step by step."""
MIN_MATCHES = 6
"""An edge with fewer fits any similarity, which then says nothing."""
AGREES = 0.15
"""Relative error of a point up to which a match speaks for its edge's similarity."""
MAX_TURN = np.radians(20.0)
MAX_LOG_SCALE = np.log(1.5)
MAX_SHIFT = 0.3
"""Of the depth of the scene."""
STEPS = 30
ROBUST_LOG_SCALE, ROBUST_SHIFT = 0.1, 0.05


@dataclass(frozen=True, kw_only=True)
class EdgeSimilarities:
    """second_from_first of all E edges, between canonical views."""

    rotation: Float64
    """[E, 3, 3]."""
    translation: Float64
    """[E, 3] in units of the second view."""
    log_scale: Float64
    """[E] logarithm of units of the second view per unit of the first."""
    depth: Float64
    """[E] mean depth of the matches in the second view."""
    support: Float64
    """[E] share of the matches that agree, by their weight."""


def edge_similarities(problem: PointmapProblem) -> EdgeSimilarities:
    """The similarity of each edge, from its matched points."""
    scene = unplaced(problem)
    edges = len(problem.pairs)
    rotation, translation = np.zeros((edges, 3, 3)), np.zeros((edges, 3))
    log_scale, depth, support = np.zeros(edges), np.zeros(edges), np.zeros(edges)
    for batch in make_batches(problem.start):
        points = [
            camera_points(problem, scene, batch.rows, problem.pairs[batch.edges, side].astype(np.int64), side)
            for side in (0, 1)
        ]
        at = batch.edges
        rotation[at], translation[at], log_scale[at], support[at] = _fit(problem, batch, points[0], points[1])
        depth[at] = (points[1][..., 2] * batch.used).sum(axis=1) / batch.used.sum(axis=1)
    return EdgeSimilarities(
        rotation=rotation, translation=translation, log_scale=log_scale, depth=depth, support=support
    )


def unplaced(problem: PointmapProblem) -> Scene:
    """All cameras at the origin, canonical scales, known focal lengths or the median of those of a camera's images."""
    cameras = range(problem.num_cameras)
    focal = [float(np.median(problem.base_focal_px[problem.camera_of_image == camera])) for camera in cameras]
    return Scene(
        cam_from_world=np.tile(np.eye(3, 4), (problem.num_images, 1, 1)),
        log_scale=np.zeros(problem.num_images),
        log_depth=np.zeros(len(problem.anchor_depth)),
        focal_px=np.where(problem.focal_is_known, problem.known_focal_px, focal),
    )


def _fit(
    problem: PointmapProblem, batch: Batch, first: Float64, second: Float64
) -> tuple[Float64, Float64, Float64, Float64]:
    """Rotations [B, 3, 3], translations [B, 3], log scales [B] and supports [B] between points [B, K, 3]."""
    # An edge whose matches all have no weight is fitted all the same, to be given no support below.
    trust = (problem.weight[batch.rows] + 1e-12) * batch.used
    weight = trust
    few = batch.used.sum(axis=1) < MIN_MATCHES
    for kernel in (*KERNELS, AGREES):
        total = np.maximum(weight.sum(axis=1), 1e-300)[:, None]
        means = [(weight[..., None] * points).sum(axis=1) / total for points in (first, second)]
        centred = [points - mean[:, None] for points, mean in zip((first, second), means, strict=True)]
        spread = [(weight * (points**2).sum(axis=-1)).sum(axis=1) for points in centred]
        covariance = (weight[..., None] * centred[1]).transpose(0, 2, 1) @ centred[0]
        left, _, right = np.linalg.svd(covariance)
        left[..., 2] *= np.sign(np.linalg.det(left @ right))[:, None]
        rotation = left @ right
        # The symmetric scale: neither view is the one without errors, so that both orders give the same.
        scale = np.sqrt(np.maximum(spread[1], 1e-300) / np.maximum(spread[0], 1e-300))
        scale = np.where(few, means[1][:, 2] / means[0][:, 2], scale)
        translation = means[1] - scale[:, None] * (rotation @ means[0][..., None])[..., 0]
        moved = scale[:, None, None] * (first @ rotation.transpose(0, 2, 1)) + translation[:, None]
        error = np.linalg.norm(moved - second, axis=-1) / np.maximum(second[..., 2], 1e-300)
        weight = trust / (1 + (error / kernel) ** 2)
    support = (trust * (error < AGREES)).sum(axis=1) / np.maximum(trust.sum(axis=1), 1e-300)
    return rotation, translation, np.log(scale), np.where(few | (trust.max(axis=1) < 1e-9), 0.0, support)


def average_start(problem: PointmapProblem, similar: EdgeSimilarities) -> tuple[Scene, Bool]:
    """Poses and scales of all images, averaged over the whole graph, and which edges [E] agree with them.

    Args:
        problem: a connected one.
        similar: of its edges.
    """
    edges = _weighted(problem, similar)
    edges = replace(edges, weight=edges.weight * trust_by_triangles(edges))
    rotations, turn = average_rotations(edges)
    weight = np.where(turn < MAX_TURN, edges.weight, 1e-6 * edges.weight)
    # World units per unit of a view: those of the second are fewer, the more of its units one of the first makes.
    log_scale, miss = _average(edges, -similar.log_scale[:, None], weight, np.full(len(weight), ROBUST_LOG_SCALE))
    weight = np.where(miss < MAX_LOG_SCALE, weight, 1e-6 * weight)
    vectors, depth = _baselines(problem, similar, rotations, log_scale[:, 0])
    centres, shift = _average(edges, vectors, weight, ROBUST_SHIFT * depth)
    agrees = (turn < MAX_TURN) & (miss < MAX_LOG_SCALE) & (shift < MAX_SHIFT * depth)
    return _placed(problem, rotations, centres, log_scale[:, 0]), agrees


def tree_start(problem: PointmapProblem, similar: EdgeSimilarities, kind: TreeKind) -> tuple[Scene, Bool]:
    """The same along a tree: what to fall back to where averaging fails.

    Args:
        problem: a connected one.
        similar: of its edges.
        kind: of the tree; clusterings take a pair with three matches per anchor of an image for as good as any.
    """
    evidence = _weighted(problem, similar).weight
    enough = saturating_score(len(problem.anchor_depth) / problem.num_images)
    number = {(first, second): edge for edge, (first, second) in enumerate(problem.pairs.tolist())}
    # A clustering may join images that stand for their clusters and are no pair: then the maximum tree has to do.
    for one in (kind, TreeKind.MAXIMUM):
        (tree,) = kinematic_trees(problem.pairs, evidence, problem.num_images, one, enough)
        if all(tuple(sorted(pair)) in number for pair in tree.edges.tolist()):
            break
    rotations, centres = np.tile(np.eye(3), (problem.num_images, 1, 1)), np.zeros((problem.num_images, 3))
    log_scale = np.zeros(problem.num_images)
    for parent, child in tree.edges.tolist():
        edge = number[min(parent, child), max(parent, child)]
        forward = 1.0 if parent < child else -1.0
        turn = similar.rotation[edge]
        rotations[child] = (turn if parent < child else turn.T) @ rotations[parent]
        log_scale[child] = log_scale[parent] - forward * similar.log_scale[edge]
        second = max(parent, child)
        shift = rotations[second].T @ similar.translation[edge] * np.exp(log_scale[second])
        centres[child] = centres[parent] - forward * shift
    return _placed(problem, rotations, centres, log_scale), np.ones(len(problem.pairs), bool)


def _weighted(problem: PointmapProblem, similar: EdgeSimilarities) -> EdgeSet:
    return EdgeSet(
        num_images=problem.num_images,
        pairs=problem.pairs,
        rotation=similar.rotation,
        translation=similar.translation,
        weight=np.maximum(np.diff(problem.start) * similar.support**2, 1e-6),
    )


def _baselines(
    problem: PointmapProblem, similar: EdgeSimilarities, rotations: Float64, log_scale: Float64
) -> tuple[Float64, Float64]:
    """Vectors [E, 3] from the first centre to the second in the world, and the depth [E] of what both see."""
    second = problem.pairs[:, 1]
    unit = np.exp(log_scale[second])
    # x₂ = R₂₁ x₁ + t: the first centre is R₂ᵀ t before the second.
    return -np.einsum("eji,ej->ei", rotations[second], similar.translation) * unit[:, None], similar.depth * unit


def _placed(problem: PointmapProblem, rotations: Float64, centres: Float64, log_scale: Float64) -> Scene:
    """The mean scale is 1."""
    mean = float(log_scale.mean())
    translation = -(rotations @ centres[:, :, None])[:, :, 0] * np.exp(-mean)
    return replace(unplaced(problem), cam_from_world=make_pose(rotations, translation), log_scale=log_scale - mean)


def _average(edges: EdgeSet, difference: Float64, weight: Float64, scale: Float64) -> tuple[Float64, Float64]:
    """Values [n, k], first 0, with x_second − x_first = difference [E, k] for most edges, and each edge's error [E].

    Args:
        edges: a connected set.
        difference: [E, k].
        weight: [E].
        scale: [E] error at which an edge loses most of its weight.
    """
    first, second = edges.pairs[:, 0], edges.pairs[:, 1]
    error = np.zeros(len(weight))
    values = np.zeros((edges.num_images, difference.shape[1]))
    for step in range(STEPS):
        # L1 first, which needs no start, then a kernel that all but forgets what is far off.
        far = error / scale
        robust = weight / np.maximum(far, 1e-3) if 0 < step < STEPS // 2 else weight / (1 + far**2) ** 2
        robust = robust / scale**2
        right = np.zeros_like(values)
        np.add.at(right, second, robust[:, None] * difference)
        np.add.at(right, first, -robust[:, None] * difference)
        if edges.num_images > 1:
            values[1:] = splu(graph_laplacian(edges, robust)[1:, 1:].tocsc()).solve(right[1:])
        error = np.linalg.norm(values[second] - values[first] - difference, axis=1)
    return values, error
