"""Photos that were all taken from one point: no positions, but rotations and focal lengths, from all matches at once.

Pairs give the rotations to start from, averaged; then the distances between matched pixels, one turned into the other
image, are brought down over all rotations and focal lengths together (Brown & Lowe, Automatic panoramic image stitching
using invariant features, IJCV 2007, section 4). It is the fine loss of pointmaps with points at any depth and cameras
that only turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mast3r_sfm.alignment.edges import components, make_edges
from mast3r_sfm.alignment.losses import FineLoss, Priors
from mast3r_sfm.alignment.normal import PER_IMAGE
from mast3r_sfm.alignment.optimise import Stopping, gauge, minimise
from mast3r_sfm.alignment.problem import PointmapProblem, Scene
from mast3r_sfm.alignment.rotations import average_rotations, trust_by_triangles
from mast3r_sfm.alignment.uncertainty import deviations
from mast3r_sfm.colmap.lens import straighten_matches
from mast3r_sfm.config import AlignConfig
from mast3r_sfm.geometry.rigid import angle_between_rotations, make_pose
from mast3r_sfm.types import AlignmentResult, Bool, Float64, Int32, PairMatches, Rig, Verdict

KERNELS_PX = (4.0, 1.0)
MAX_MATCHES = 1000
"""Of a pair, evenly picked."""


def align_turns(
    matches: Sequence[PairMatches], placed: Int32, rig: Rig, pixel_scale: float, config: AlignConfig
) -> list[AlignmentResult]:
    """Rotations of the images of every part that pure rotations hold together and nothing else; largest part first.

    All cameras of a part stand at the origin, and their depth is not known.

    Args:
        matches: all edges of the view graph, verified or not.
        placed: images that have a pose with depth; what is tied to them can be placed against their model.
        rig: cameras in photo pixels; focal lengths that are not known are found anew.
        pixel_scale: photo pixels per pixel of matching.
        config: thresholds.
    """
    matches, rig = straighten_matches(matches, rig)
    waiting = [np.array([e for e, match in enumerate(matches) if match.verdict is Verdict.PURE_ROTATION], np.int32)]
    results: list[AlignmentResult] = []
    while waiting:
        candidates = waiting.pop()
        pairs = np.array([(matches[edge].first, matches[edge].second) for edge in candidates], np.int32).reshape(-1, 2)
        for part in components(len(rig.camera_of_image), pairs):
            if len(part) < config.min_images or np.isin(part, placed).any():
                continue
            inside = candidates[np.isin(pairs[:, 0], part)]
            chosen = [matches[edge] for edge in inside]
            good, rotations = _averaged(chosen, part, np.radians(config.max_rotation_error_deg))
            if good.all():
                results.append(replace(_refined(chosen, part, rotations, rig, pixel_scale), edges=inside))
            else:
                waiting.append(inside[good])
    return sorted(results, key=lambda result: (-len(result.images), int(result.images[0])))


def _averaged(matches: list[PairMatches], images: Int32, bound: float) -> tuple[Bool, Float64]:
    """Which edges to keep for another try (all: none is needed), and averaged rotations [n, 3, 3]."""
    edges = make_edges(matches, images)
    rotations, error = average_rotations(replace(edges, weight=edges.weight * trust_by_triangles(edges)))
    # The worst first: the others may be their fault.
    return np.asarray(error <= max(bound, float(error.max()) / 3), np.bool_), rotations


def _refined(
    matches: list[PairMatches], images: Int32, rotations: Float64, rig: Rig, pixel_scale: float
) -> AlignmentResult:
    problem = _problem(matches, images, rig, pixel_scale)
    cameras = np.unique(rig.camera_of_image[images])
    scene = Scene(
        cam_from_world=make_pose(rotations, np.zeros((len(images), 3))),
        log_scale=np.zeros(len(images)),
        log_depth=np.zeros(len(images)),
        focal_px=np.array([rig.cameras[int(one)].params[0] / pixel_scale for one in cameras]),
    )
    held = np.zeros(PER_IMAGE * len(images) + len(cameras), bool)
    for still in range(3, PER_IMAGE):  # shifts and scales
        held[still : PER_IMAGE * len(images) : PER_IMAGE] = True
    history: tuple[float, ...] = ()
    for kernel in KERNELS_PX:
        loss = FineLoss(problem, kernel, Priors(), move_depths=False)
        scene, course = minimise(loss, scene, Stopping(), held | gauge(problem))
        history += course.history[1:]
    turned = scene.cam_from_world[:, :, :3]
    first, second = problem.pairs.T
    between = turned[second] @ turned[first].transpose(0, 2, 1)
    missed = angle_between_rotations(np.array([match.second_from_first[:, :3] for match in matches]), between)
    return AlignmentResult(
        images=images,
        edges=np.arange(len(matches), dtype=np.int32),
        cam_from_world=scene.cam_from_world,
        residual_deg=np.array(
            [np.degrees(np.median(missed[(problem.pairs == image).any(axis=1)])) for image in range(len(images))]
        ),
        history=history or (loss.value(scene),),
        stop_reason=f"pure rotation: the turns settled after {len(history)} steps",
        focal_px=pixel_scale * scene.focal_px[problem.camera_of_image],
        rotation_sigma_deg=deviations(loss, scene, held, drifts=3).rotation_deg,
    )


def _problem(matches: list[PairMatches], images: Int32, rig: Rig, pixel_scale: float) -> PointmapProblem:
    """All points at depth 1, which turns do not look at."""
    pairs = np.searchsorted(images, [(match.first, match.second) for match in matches]).reshape(-1, 2)
    some = [np.linspace(0, len(match) - 1, min(len(match), MAX_MATCHES)).astype(int) for match in matches]
    counts = np.array([len(rows) for rows in some])
    of_side = np.repeat(pairs, counts, axis=0)
    cameras, local = np.unique(rig.camera_of_image[images], return_inverse=True)
    centre = np.array([rig.cameras[int(one)].params[-2:] for one in cameras])[local]
    xy = np.stack(
        [
            np.concatenate([getattr(match, name)[rows] for match, rows in zip(matches, some, strict=True)])
            for name in ("xy_first", "xy_second")
        ],
        axis=1,
    )
    focal = np.array([rig.cameras[int(one)].params[0] for one in cameras]) / pixel_scale
    known = np.array([rig.cameras[int(one)].focal_is_known for one in cameras])
    return PointmapProblem(
        base_focal_px=focal[local],
        camera_of_image=local.astype(np.int32),
        known_focal_px=np.where(known, focal, np.nan),
        image_of_anchor=np.arange(len(images)),
        anchor_depth=np.ones(len(images)),
        pairs=pairs.astype(np.int32),
        start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        pixels=(xy - centre[of_side]) / pixel_scale,
        anchor=of_side.astype(np.int64),
        offset=np.ones(of_side.shape),
        weight=np.ones(len(of_side)),
    )
