"""Poses that are known before anything is reconstructed, and the frame that they span."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.spatial.transform import Rotation

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.geometry.rigid import camera_centre, compose_poses, invert_pose, make_pose
from mast3r_sfm.geometry.similarity import Similarity
from mast3r_sfm.types import Bool, Float64, Int32

_STEPS = 100
_FLOOR = 1e-9


@dataclass(frozen=True, kw_only=True)
class KnownPoses:
    """Poses of some images, all in one frame and scale."""

    images: Int32
    """[n] image numbers, ascending, each once."""
    params: Float64
    """[n, 7] cam_from_world: the unit quaternion x, y, z, w of the rotation, and the translation."""
    is_fixed: bool = True
    """Nothing changes them; otherwise they are approximate."""

    def __post_init__(self) -> None:
        if self.params.shape != (len(self.images), 7) or not np.isfinite(self.params).all():
            raise ShapeError(f"KnownPoses.params must be finite and [{len(self.images)}, 7], not {self.params.shape}")
        if (np.diff(self.images) <= 0).any():
            raise ShapeError("KnownPoses.images must be ascending, each once")
        if (np.abs(np.linalg.norm(self.params[:, :4], axis=1) - 1) > 1e-6).any():
            raise ShapeError("KnownPoses.params: a quaternion has not unit length")

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def cam_from_world(self) -> Float64:
        """[n, 3, 4]."""
        return make_pose(Rotation.from_quat(self.params[:, :4]).as_matrix(), self.params[:, 4:])

    def rows(self, images: Int32) -> tuple[Int32, Bool]:
        """The row of each image [...], 0 where there is none, and whether there is one [...]."""
        if not len(self.images):
            return np.zeros_like(images), np.zeros(images.shape, np.bool_)
        row = np.searchsorted(self.images, images).clip(max=len(self.images) - 1).astype(np.int32)
        return row, np.asarray(self.images[row] == images, np.bool_)

    def relative(self, first: int, second: int) -> Float64 | None:
        """second_from_first [3, 4] of two images, by number; None where one of their poses is not known."""
        row, known = self.rows(np.array([first, second], np.int32))
        if not known.all():
            return None
        return compose_poses(self.cam_from_world[row[1]], invert_pose(self.cam_from_world[row[0]]))


def similarity_between_poses(source: Float64, target: Float64) -> Similarity:
    """The similarity of worlds that brings source poses closest to target poses, robustly (L1 by re-weighting).

    Rotations of cameras fix that of the world, so that two poses are enough, and positions on a line are.

    Args:
        source: [n, 3, 4] cam_from_world.
        target: [n, 3, 4] of the same cameras in another world; one pose fixes all but the scale, which is then 1.

    Returns:
        target_from_source.

    Raises:
        ShapeError: no pose.
    """
    if source.shape != target.shape or len(source) < 1:
        raise ShapeError(f"poses of shapes {source.shape} and {target.shape} fix no similarity")
    turns = Rotation.from_matrix(target[:, :, :3].transpose(0, 2, 1) @ source[:, :, :3])
    rotation = _median_rotation(turns)
    turned, there = camera_centre(source) @ rotation.T, camera_centre(target)
    scale, translation = _least_distances(turned, there)
    return Similarity(scale=scale, rotation=rotation, translation=translation)


def moved_poses(poses: Float64, similarity: Similarity) -> Float64:
    """cam_from_world [n, 3, 4] in the world that a similarity target_from_source leads to; lengths scale with it."""
    rotation = poses[:, :, :3] @ similarity.rotation.T
    centres = similarity.apply(camera_centre(poses))
    return make_pose(rotation, -(rotation @ centres[:, :, None])[:, :, 0])


def _median_rotation(turns: Rotation) -> Float64:
    """[3, 3] of least summed angle, from the turn that most of the others are near to."""
    some = turns[np.linspace(0, len(turns) - 1, min(len(turns), 100)).astype(int)]
    sums = [float((turn.inv() * turns).magnitude().sum()) for turn in some]
    rotation = some[int(np.argmin(sums))]
    for _ in range(_STEPS):
        miss = (rotation.inv() * turns).as_rotvec()
        weight = 1 / np.maximum(np.linalg.norm(miss, axis=1), _FLOOR)
        step = (weight[:, None] * miss).sum(axis=0) / weight.sum()
        rotation = rotation * Rotation.from_rotvec(step)
        if np.linalg.norm(step) < 1e-14:
            break
    matrix: Float64 = rotation.as_matrix()
    return matrix


def _least_distances(source: Float64, target: Float64) -> tuple[float, Float64]:
    """Scale and translation [3] of least Σ ‖target − scale · source − translation‖ over points [n, 3].

    The sum is convex, so that re-weighting finds its minimum from anywhere. The scale of points that coincide is 1.
    """
    size = float(np.abs(target - np.median(target, axis=0)).max()) + _FLOOR
    weight, scale = np.ones(len(source)), 1.0
    for _ in range(_STEPS):
        share = weight / weight.sum()
        means = share @ source, share @ target
        apart = [points - mean for points, mean in zip((source, target), means, strict=True)]
        spread = float(share @ (apart[0] ** 2).sum(axis=1))
        product = float(share @ (apart[0] * apart[1]).sum(axis=1))
        # Where points coincide or are mirrored, nothing says how large the world is.
        scale = product / spread if product > 1e-24 * (1 + spread) and spread > 0 else 1.0
        translation = means[1] - scale * means[0]
        miss = np.linalg.norm(target - scale * source - translation, axis=1)
        weight = 1 / np.maximum(miss, 1e-9 * size)
    return scale, np.asarray(translation, np.float64)
