"""Parts of a collection that are rigid but for one similarity between them, and a pair of images across the two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.spatial.transform import Rotation

from mast3r_sfm.geometry.epipolar import homogeneous, triangulate
from mast3r_sfm.geometry.rigid import camera_centre
from mast3r_sfm.matching.calibrated import View
from mast3r_sfm.types import AlignmentResult, Bool, Float32, Float64, Int64


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images placed relative to each other, or one image."""

    images: Int64
    """[n] ascending."""
    rotation: Float64
    """[n, 3, 3] camera from part."""
    centre: Float64
    """[n, 3]; their spread about their mean is 1."""

    @classmethod
    def of(cls, aligned: AlignmentResult) -> Part:
        """The images of an aligned part."""
        centre = camera_centre(aligned.cam_from_world)
        centre = centre - centre.mean(axis=0)
        spread = float(np.sqrt((centre**2).sum(axis=1).mean()))
        return cls(
            images=aligned.images.astype(np.int64),
            rotation=aligned.cam_from_world[:, :, :3],
            centre=centre / max(spread, 1e-12),
        )

    @classmethod
    def single(cls, image: int) -> Part:
        """One image by itself."""
        return cls(
            images=np.array([image], np.int64),
            rotation=np.eye(3)[None],
            centre=np.zeros((1, 3)),
        )


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Where the second part is: X in the first = scale · rotation · X in the second + shift."""

    rotation: Float64
    """[3, 3]."""
    shift: Float64
    """[3]."""
    scale: float

    @classmethod
    def of(cls, values: Float64) -> Similarity:
        """From a rotation vector, a shift and the logarithm of a scale, [7]."""
        return cls(
            rotation=Rotation.from_rotvec(values[:3]).as_matrix(), shift=values[3:6], scale=float(np.exp(values[6]))
        )

    @property
    def values(self) -> Float64:
        """[7], see `of`."""
        vector: Float64 = Rotation.from_matrix(self.rotation).as_rotvec()
        return np.concatenate([vector, self.shift, [np.log(self.scale)]])


@dataclass(frozen=True, kw_only=True)
class WeakPair:
    """A pair across two parts with its distinct matches, and others that agree with a geometry of its own, in network
    pixels."""

    number: int
    """Of its edge."""
    rotation: tuple[Float64, Float64]
    """[3, 3] of both cameras, from their parts; of the image in the first part first, as in all that follows."""
    centre: tuple[Float64, Float64]
    images: tuple[int, int]
    views: tuple[View, View]
    xy: tuple[Float64, Float64]
    """[M, 2]."""
    confidence: Float32
    """[M]."""
    is_distinct: Bool
    """[M]."""
    is_own: Bool
    """[M] is distinct, and agrees with the pair's own geometry."""
    num_putative: int
    """Distinct matches that were judged."""
    is_swapped: bool
    """The edge's first image is in the second part."""
    has_scale: bool
    """The second part has several images."""

    @cached_property
    def directions(self) -> tuple[Float64, Float64]:
        """[M, 3] viewing directions in the frames of both cameras, with a third coordinate of 1."""
        first, second = (
            homogeneous((xy - view.centre_px) / view.focal_px) for xy, view in zip(self.xy, self.views, strict=True)
        )
        return first, second

    def pose(self, similarity: Similarity) -> Float64:
        """[3, 4] second camera from first, with a baseline of 1."""
        baseline = similarity.scale * similarity.rotation @ self.centre[1] + similarity.shift - self.centre[0]
        turned = self.rotation[1] @ similarity.rotation.T
        shift = -turned @ baseline / max(float(np.linalg.norm(baseline)), 1e-12)
        return np.concatenate([turned @ self.rotation[0].T, shift[:, None]], axis=1)

    def value(self, essential: Float64) -> Float64:
        """x₂ᵀ E x₁ [..., M] of all matches, by matrices [..., 3, 3]."""
        first, second = self.directions
        value: Float64 = ((first @ essential.swapaxes(-1, -2)) * second).sum(axis=-1)
        return value

    def error(self, essential: Float64) -> Float64:
        """Signed Sampson errors [..., M] in pixels of all matches, by matrices [..., 3, 3]."""
        first, second = self.directions
        line_second = first @ essential.swapaxes(-1, -2) / self.views[1].focal_px
        line_first = second @ essential / self.views[0].focal_px
        slope = (line_second[..., :2] ** 2).sum(axis=-1) + (line_first[..., :2] ** 2).sum(axis=-1)
        error: Float64 = self.value(essential) / np.sqrt(np.maximum(slope, 1e-300))
        return error

    def judged(self, similarity: Similarity, max_error_px: float) -> Judged:
        """What the similarity says of all matches."""
        pose = self.pose(similarity)
        unit = [rays / np.linalg.norm(rays, axis=1, keepdims=True) for rays in self.directions]
        points, angle = triangulate(pose, unit[0], unit[1])
        points_second = points @ pose[:, :3].T + pose[:, 3]
        # Rays that are parallel to within the noise of a pixel have no depth worth keeping.
        noise = max_error_px / ((self.views[0].focal_px + self.views[1].focal_px) / 2)
        near = np.abs(self.error(essential_matrix(pose))) < max_error_px
        kept = near & (points[:, 2] > 0) & (points_second[:, 2] > 0) & (angle > noise / 4)
        return Judged(pose=pose, points=(points, points_second), kept=np.asarray(kept, np.bool_))


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A weak pair under a similarity."""

    pose: Float64
    """[3, 4] second camera from first."""
    points: tuple[Float64, Float64]
    """[M, 3] of all matches, in the frame of either camera."""
    kept: Bool
    """[M] agrees, and lies in front of both cameras."""


def essential_matrix(pose: Float64) -> Float64:
    """[3, 3] of a relative pose [3, 4]."""
    essential: Float64 = np.cross(pose[:, 3], pose[:, :3], axisb=0, axisc=0)
    return essential
