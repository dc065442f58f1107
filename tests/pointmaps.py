"""Alignment problems from the oracle's pointmaps, and the errors of their solutions.

problem = oracle_problem(room_views(), pixel_px=1.0, depth_relative=0.01, log_scale=0.3)
errors = measure(align_pointmaps(problem, PointmapOptions()).scene, problem, room_views())
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from mast3r_sfm.alignment.canonical import CanonicalSums
from mast3r_sfm.alignment.problem import EdgeMatches, PointmapProblem, Scene, make_problem
from mast3r_sfm.geometry.rigid import angle_between_rotations, camera_centre, make_pose
from mast3r_sfm.geometry.similarity import align_similarity, align_similarity_robust
from mast3r_sfm.matching.putative import pair_points
from mast3r_sfm.matching.reciprocal import match_predictions
from mast3r_sfm.synthetic.covisibility import correspond
from mast3r_sfm.synthetic.oracle import OracleModel, OracleNoise
from mast3r_sfm.synthetic.render import View
from mast3r_sfm.types import Float64, Int64, PairMatches, PairPrediction, Verdict
from tests.scenes import load

CONFIDENT = 5.0
LEAST_MATCHES, MOST_MATCHES = 40, 1000


@dataclass(frozen=True, kw_only=True)
class SceneErrors:
    """Means over all images or pairs of images."""

    rotation_deg: float
    """Of the relative rotations."""
    position_percent: float
    """Of the longest baseline, after a similarity on the centres."""
    focal_percent: float


def oracle_problem(
    views: Mapping[str, View], *, by_descriptors: bool = False, seed: int = 0, **noise: float
) -> PointmapProblem:
    """What the oracle says of all pairs of views; edges stand where enough matches are confident.

    Args:
        views: by name.
        by_descriptors: match the oracle's descriptors. By default, matches are the true ones with its noise, which is
            many times as fast and the same but for pairs that the oracle takes for others.
        seed: of the oracle.
        noise: fields of OracleNoise.
    """
    names = sorted(views)
    model = OracleModel(views, OracleNoise(**noise), seed)
    encodings = model.encode(load(views))
    camera = views[names[0]].camera
    height, width = camera.height_px, camera.width_px
    sums = [CanonicalSums((height, width)) for _ in names]
    rng = np.random.default_rng(seed)
    edges = []
    for first in range(len(names)):
        for second in range(first + 1, len(names)):
            _, forward, backward = next(iter(model.predict([(encodings[first], encodings[second])])))
            if by_descriptors:
                pixels = _match_descriptors(forward, backward, width)
            else:
                pixels = _true_matches(views[names[first]], views[names[second]], rng, noise.get("pixel_px", 0.0))
            if len(pixels) < LEAST_MATCHES:
                continue
            for image, prediction in ((first, forward), (second, backward)):
                points, confidence = prediction.first.points_at(torch.arange(height * width))
                sums[image].add(
                    points.numpy().reshape(height, width, 3).astype(np.float64),
                    confidence.numpy().reshape(height, width).astype(np.float64),
                )
            edges.append(
                EdgeMatches(
                    first=first,
                    second=second,
                    pixels_first=pixels[:, 0],
                    pixels_second=pixels[:, 1],
                    confidence=np.ones(len(pixels)),
                )
            )
    # Integer pixels here have their centres at 0, COLMAP's at 0.5.
    centre = camera.intrinsics[:2, 2] - 0.5
    return make_problem([one.view(centre) for one in sums], np.tile(centre, (len(names), 1)), edges)


def oracle_matches(views: Mapping[str, View], *, seed: int = 0, **noise: float) -> list[PairMatches]:
    """The true matches of all pairs of views, with the oracle's noise and its points, as the match stage has them."""
    names = sorted(views)
    model = OracleModel(views, OracleNoise(**noise), seed)
    encodings = model.encode(load(views))
    width = views[names[0]].camera.width_px
    rng = np.random.default_rng(seed)
    matches = []
    for first in range(len(names)):
        for second in range(first + 1, len(names)):
            pixels = _true_matches(views[names[first]], views[names[second]], rng, noise.get("pixel_px", 0.0))
            if len(pixels) < LEAST_MATCHES:
                continue
            _, *orders = next(iter(model.predict([(encodings[first], encodings[second])])))
            index = pixels[..., 1] * width + pixels[..., 0]
            points = pair_points((orders[0], orders[1]))(index[:, 0], index[:, 1])
            fit, _ = align_similarity_robust(points.first, points.second)
            matches.append(
                PairMatches(
                    first=first,
                    second=second,
                    xy_first=pixels[:, 0] + 0.5,
                    xy_second=pixels[:, 1] + 0.5,
                    confidence=np.full(len(pixels), 10.0, np.float32),
                    points_first=points.first,
                    points_second=points.second,
                    verdict=Verdict.GOOD,
                    inlier_ratio=0.8,
                    second_from_first=make_pose(fit.rotation, fit.translation / fit.scale),
                )
            )
    return matches


def with_known_focal(problem: PointmapProblem, views: Mapping[str, View]) -> PointmapProblem:
    """The same with the true focal lengths, which are not to be changed."""
    focal = np.array([views[name].K[0, 0] for name in sorted(views)])
    return replace(problem, known_focal_px=focal)


def _true_matches(first: View, second: View, rng: np.random.Generator, noise_px: float) -> Int64:
    """[M, 2, 2] whole pixels of both views (column, row)."""
    xy, seen = correspond(first, second)
    row, column = np.nonzero(seen)
    chosen = rng.permutation(len(row))[:MOST_MATCHES]
    row, column = row[chosen], column[chosen]
    other = np.rint(xy[row, column] - 0.5 + rng.normal(0, noise_px, (len(row), 2))).astype(np.int64)
    height, width = second.depth.shape
    inside = ((other >= 0) & (other < [width, height])).all(axis=1)
    return np.stack([np.stack([column, row], axis=1), other], axis=1)[inside]


def _match_descriptors(forward: PairPrediction, backward: PairPrediction, width: int) -> Int64:
    found = match_predictions(forward, backward, 8)
    sides = [
        np.stack([side.numpy() % width, side.numpy() // width], axis=1)
        for side in (found.pairs.first, found.pairs.second)
    ]
    pixels: Int64 = np.stack(sides, axis=1).astype(np.int64)[found.confidence.numpy() > CONFIDENT]
    return pixels


def measure(scene: Scene, problem: PointmapProblem, views: Mapping[str, View]) -> SceneErrors:
    """Compare with the truth."""
    truth = np.array([views[name].cam_from_world for name in sorted(views)])
    found, centre = camera_centre(scene.cam_from_world), camera_centre(truth)
    fit = align_similarity(found, centre, collinear_ok=True)
    first, second = np.triu_indices(len(truth), 1)
    relative = [pose[second, :, :3] @ pose[first, :, :3].transpose(0, 2, 1) for pose in (scene.cam_from_world, truth)]
    span = float(np.linalg.norm(centre[:, None] - centre[None], axis=-1).max())
    focal: Float64 = np.array([views[name].K[0, 0] for name in sorted(views)])
    own = scene.focal_px[problem.camera_of_image]
    return SceneErrors(
        rotation_deg=float(np.degrees(angle_between_rotations(relative[0], relative[1])).mean()),
        position_percent=100 * float(np.linalg.norm(fit.apply(found) - centre, axis=1).mean()) / span,
        focal_percent=100 * float(np.abs(own / focal - 1).mean()),
    )
