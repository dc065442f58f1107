"""Pinhole cameras with a pose, and the paths on which the photos of a scene are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mast3r_sfm.errors import ConfigError, ShapeError
from mast3r_sfm.geometry.rigid import camera_centre, make_pose, rotation_from_axis_angle
from mast3r_sfm.types import Float64

Kind = Literal["room", "facade", "object", "plane", "rotation"]
"""A scene with its way of photographing it; `rotation` is the room seen from one point, which carries no depth."""


@dataclass(frozen=True, kw_only=True)
class PosedCamera:
    """A pinhole camera without distortion, somewhere in the world."""

    cam_from_world: Float64
    """[3, 4]."""
    intrinsics: Float64
    """[3, 3] in COLMAP's pixels: the centre of the top-left pixel is (0.5, 0.5)."""
    width_px: int
    height_px: int

    def __post_init__(self) -> None:
        if self.cam_from_world.shape != (3, 4) or self.intrinsics.shape != (3, 3):
            raise ShapeError(
                f"PosedCamera needs cam_from_world [3, 4] and intrinsics [3, 3], "
                f"not {self.cam_from_world.shape} and {self.intrinsics.shape}"
            )
        if self.width_px < 1 or self.height_px < 1:
            raise ShapeError(f"PosedCamera: size {self.width_px}×{self.height_px} px must be positive")

    @property
    def centre(self) -> Float64:
        """[3] position in the world."""
        return camera_centre(self.cam_from_world)

    def rays(self, xy: Float64) -> Float64:
        """Directions [M, 3] in the camera frame, with z = 1, of pixels [M, 2]."""
        homogeneous = np.concatenate([xy, np.ones((len(xy), 1))], axis=-1)
        directions: Float64 = homogeneous @ np.linalg.inv(self.intrinsics).T
        return directions

    def project(self, points: Float64) -> tuple[Float64, Float64]:
        """World points [..., 3] to pixels [..., 2] and depths z [...]. Points behind get meaningless pixels."""
        local = points @ self.cam_from_world[:, :3].T + self.cam_from_world[:, 3]
        depth = local[..., 2]
        # Behind or at the camera there is no pixel; a division by a tiny depth keeps the arrays finite.
        image = local @ self.intrinsics.T / np.where(depth > 1e-9, depth, 1e-9)[..., None]
        return image[..., :2], depth


def look_at(position: Float64, target: Float64, roll: float = 0.0) -> Float64:
    """Pose [3, 4] cam_from_world at a position [3], looking at a target [3], rolled by `roll` radians."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(np.array([0.0, 1.0, 0.0]), forward)
    right /= np.linalg.norm(right)
    upright = np.stack([right, np.cross(forward, right), forward])
    rotation = rotation_from_axis_angle(np.array([0.0, 0.0, roll])) @ upright
    return make_pose(rotation, -rotation @ position)


def make_cameras(
    kind: Kind, number: int, *, width_px: int = 640, height_px: int = 480, seed: int = 0
) -> tuple[PosedCamera, ...]:
    """Place cameras along the path of a kind of scene, with a little unsteadiness of the hand.

    Args:
        kind: which path.
        number: how many cameras; the paths of room, facade and plane keep their length and get denser, an orbit takes
            steps of at most 20° until it is a full turn.
        width_px, height_px: size of the photos. The field of view is 62° along the longer side.
        seed: of the unsteadiness.

    Raises:
        ConfigError: unknown kind, or less than one camera.
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"synthetic scene kind {kind!r}: must be one of {', '.join(get_args(Kind))}")
    if number < 1:
        raise ConfigError(f"number of cameras {number}: must be at least 1")
    rng = np.random.default_rng([seed, 1])
    positions, targets = _path(kind, number)
    if kind != "rotation":
        positions = positions + rng.normal(0.0, 0.04, positions.shape)
    targets = targets + rng.normal(0.0, 0.08, targets.shape)
    rolls = rng.normal(0.0, np.radians(2.0), number)
    focal = 0.5 * max(width_px, height_px) / np.tan(np.radians(31.0))
    intrinsics = np.array([[focal, 0.0, width_px / 2], [0.0, focal, height_px / 2], [0.0, 0.0, 1.0]])
    return tuple(
        PosedCamera(
            cam_from_world=look_at(position, target, roll),
            intrinsics=intrinsics,
            width_px=width_px,
            height_px=height_px,
        )
        for position, target, roll in zip(positions, targets, rolls, strict=True)
    )


def _path(kind: Kind, number: int) -> tuple[Float64, Float64]:
    """Positions and targets [number, 3] along the path of a kind."""
    along = np.linspace(-1.0, 1.0, number) if number > 1 else np.zeros(1)
    level = np.zeros(number)
    # Heights go up and down: a path in one plane would leave the scene's shape weakly determined.
    wave = np.sin(np.arange(number) * 2.1)
    if kind == "room":
        angle = np.radians(62.0) * along
        positions = np.stack([-1.9 * np.sin(angle), -0.25 + 0.2 * wave, -1.5 * np.cos(angle) + 0.1], axis=-1)
        return positions, np.stack([1.3 * np.sin(angle), 0.2 + level, 1.9 * np.cos(angle)], axis=-1)
    if kind in ("facade", "plane"):
        height = -0.2 + 0.45 * wave
        positions = np.stack([3.6 * along, height, -5.4 + 0.9 * np.abs(along) + 0.2 * wave], axis=-1)
        return positions, np.stack([1.3 * along, -0.45 + level, level], axis=-1)
    if kind == "object":
        angle = np.arange(number) * min(np.radians(20.0), 2 * np.pi / number)
        positions = np.stack([2.9 * np.sin(angle), -1.1 + 0.25 * wave, -2.9 * np.cos(angle)], axis=-1)
        return positions, np.stack([level, 0.3 + level, level], axis=-1)
    angle = np.radians(38.0) * along
    positions = np.tile([0.0, -0.1, -0.6], (number, 1))
    return positions, positions + np.stack([np.sin(angle), 0.12 * wave, np.cos(angle)], axis=-1) * 3.0
