"""Images that stand in no model, tried against the points of a finished one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pycolmap

from mast3r_sfm.colmap.held import Held
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.colmap.solving import adjust_around, cameras_of
from mast3r_sfm.types import Bool, Float64, Int64

MIN_INLIERS, MIN_SHARE = 30, 0.25
"""Points that an image must see where they are, and share of those that it matches: those of COLMAP's mapper. Between
photos of different places, matches agree with one pose by chance for a handful of points."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """When an image is believed to stand somewhere."""

    max_error_px: float
    """Photo pixels between where it sees a point and where that projects."""
    bundle: pycolmap.BundleAdjustmentOptions
    """How it is adjusted."""
    seed: int


def register_by_points(
    reconstruction: pycolmap.Reconstruction,
    cache: pycolmap.DatabaseCache,
    candidates: Collection[int],
    evidence: Evidence,
    held: Held,
) -> pycolmap.Reconstruction | None:
    """Register images by the points of a model that they match; what is registered may help the next one.

    Args:
        reconstruction: a finished model; it is not changed.
        cache: of its database.
        candidates: numbers of images.
        evidence: what an image must show.
        held: what is known.

    Returns:
        a copy with the images that showed it; None where there is none.
    """
    waiting = sorted(set(candidates).intersection(cache.images.keys()).difference(reconstruction.reg_image_ids()))
    current, added = pycolmap.Reconstruction(reconstruction), 0
    for number in waiting:
        _add_image(current, cache, number)
    matches = cache.correspondence_graph
    while waiting:
        seen = {number: _matched_points(current, matches, number) for number in waiting}
        # The one with the most points first; the others are asked anew, since it may show them more.
        order = sorted(waiting, key=lambda number: (-len(seen[number][0]), number))
        for number in order:
            tried = _with_image(current, number, seen[number], evidence, held)
            if tried is not None:
                current, added = tried, added + 1
                waiting.remove(number)
                break
        else:
            break
    return current if added else None


def _add_image(reconstruction: pycolmap.Reconstruction, cache: pycolmap.DatabaseCache, number: int) -> None:
    """Add an image of the database, without a pose, with what it needs; finished models hold none of those."""
    image = cache.image(number)
    frame = cache.frame(image.frame_id)
    if not reconstruction.exists_camera(image.camera_id):
        reconstruction.add_camera(cache.camera(image.camera_id))
    if not reconstruction.exists_rig(frame.rig_id):
        reconstruction.add_rig(cache.rig(frame.rig_id))
    if not reconstruction.exists_frame(image.frame_id):
        reconstruction.add_frame(frame)
    if not reconstruction.exists_image(number):
        reconstruction.add_image(image)


def _matched_points(
    reconstruction: pycolmap.Reconstruction, matches: pycolmap.CorrespondenceGraph, number: int
) -> tuple[Int64, Int64]:
    """Keypoints [M] of an image and numbers [M] of the points that they match, each of these pairs once."""
    pairs = [np.zeros((0, 2), np.int64)]
    if matches.exists_image(number):
        for other in sorted(reconstruction.reg_image_ids()):
            if matches.exists_image(other) and matches.num_matches_between_images(number, other):
                image = reconstruction.image(other)
                point_of = np.full(image.num_points2D(), -1, np.int64)
                observed = np.array(image.get_observation_point2D_idxs(), np.int64)
                point_of[observed] = [keypoint.point3D_id for keypoint in image.get_observation_points2D()]
                found = matches.extract_matches_between_images(number, other).astype(np.int64)
                found[:, 1] = point_of[found[:, 1]]
                pairs.append(found[found[:, 1] >= 0])
    keypoint, point = np.unique(np.concatenate(pairs), axis=0).T
    return keypoint, point


def _with_image(
    reconstruction: pycolmap.Reconstruction,
    number: int,
    seen: tuple[Int64, Int64],
    evidence: Evidence,
    held: Held,
) -> pycolmap.Reconstruction | None:
    """A copy with one more image, adjusted together with its neighbours; None where too little speaks for it."""
    keypoint, point = seen
    if len(keypoint) < MIN_INLIERS:
        return None
    tried = pycolmap.Reconstruction(reconstruction)
    image = tried.image(number)
    xy = np.array([image.point2D(one).xy for one in keypoint.tolist()])
    xyz = np.array([tried.point3D(one).xyz for one in point.tolist()])
    camera = tried.camera(image.camera_id)
    is_new = image.camera_id not in cameras_of(tried) | held.fixed_cameras
    options, refinement = pycolmap.AbsolutePoseEstimationOptions(), pycolmap.AbsolutePoseRefinementOptions()
    options.ransac.max_error, options.ransac.random_seed = evidence.max_error_px, evidence.seed
    options.estimate_focal_length = is_new and not camera.has_prior_focal_length
    refinement.refine_focal_length = is_new
    found = pycolmap.estimate_and_refine_absolute_pose(xy, xyz, camera, options, refinement)
    if found is None:
        return None
    frame = tried.frame(image.frame_id)
    frame.rig_from_world = found["cam_from_world"]
    tried.register_frame(image.frame_id)
    chosen = _one_to_one(keypoint, point, _errors(tried, number, xy, xyz), evidence.max_error_px)
    share = len(np.unique(keypoint[chosen])) / len(np.unique(keypoint))
    if chosen.sum() < MIN_INLIERS or share < MIN_SHARE:
        return None
    for one, its_point in zip(keypoint[chosen].tolist(), point[chosen].tolist(), strict=True):
        tried.add_observation(its_point, pycolmap.TrackElement(number, one))
    adjust_around(tried, number, evidence.bundle, held)
    manager = pycolmap.ObservationManager(tried)
    manager.filter_observations_with_negative_depth()
    manager.filter_points3D_in_images(evidence.max_error_px, 0.0, {number})
    return tried if tried.image(number).num_points3D >= MIN_INLIERS else None


def _errors(reconstruction: pycolmap.Reconstruction, number: int, xy: Float64, xyz: Float64) -> Float64:
    """[M] pixels between where an image sees points and where they project; infinite behind it."""
    distance = np.linalg.norm(ColmapModel(reconstruction).project(number - 1, xyz) - xy, axis=1)
    return np.where(np.isfinite(distance), distance, np.inf)


def _one_to_one(keypoint: Int64, point: Int64, error: Float64, max_error: float) -> Bool:
    """[M] pairs of least error, such that each keypoint and each point stands in one of them at most."""
    chosen = np.zeros(len(error), np.bool_)
    order = np.argsort(error, kind="stable")
    order = order[error[order] < max_error]
    for side in (keypoint, point):
        order = np.sort(order[np.unique(side[order], return_index=True)[1]])
        order = order[np.argsort(error[order], kind="stable")]
    chosen[order] = True
    return chosen
