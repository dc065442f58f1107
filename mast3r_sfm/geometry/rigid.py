"""Rigid transforms as [..., 3, 4] arrays named `a_from_b`: x_a = R x_b + t. Float64, any leading shape."""

from __future__ import annotations

import numpy as np

from mast3r_sfm.types import Float64


def make_pose(rotation: Float64, translation: Float64) -> Float64:
    """Put a rotation [..., 3, 3] and a translation [..., 3] into one [..., 3, 4] transform."""
    return np.concatenate([rotation, translation[..., None]], axis=-1)


def invert_pose(a_from_b: Float64) -> Float64:
    """Give b_from_a [..., 3, 4] of a_from_b [..., 3, 4]."""
    inverse = np.swapaxes(a_from_b[..., :3], -1, -2)
    return make_pose(inverse, -(inverse @ a_from_b[..., 3:])[..., 0])


def compose_poses(a_from_b: Float64, b_from_c: Float64) -> Float64:
    """Give a_from_c [..., 3, 4]: first b_from_c, then a_from_b."""
    rotation = a_from_b[..., :3] @ b_from_c[..., :3]
    return make_pose(rotation, (a_from_b[..., :3] @ b_from_c[..., 3:])[..., 0] + a_from_b[..., 3])


def transform_points(a_from_b: Float64, points: Float64) -> Float64:
    """Move points [..., 3] from frame b to frame a by one transform [3, 4]."""
    return points @ a_from_b[:, :3].T + a_from_b[:, 3]


def camera_centre(cam_from_world: Float64) -> Float64:
    """Give the camera's centre [..., 3] in the world."""
    return invert_pose(cam_from_world)[..., 3]


def rotation_from_axis_angle(vector: Float64) -> Float64:
    """Rotations [..., 3, 3] from axis times angle in radians [..., 3], by Rodrigues' formula."""
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vector, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*vector.shape[:-1], 3, 3)
    # sin(a)/a and (1 - cos(a))/a², written with sinc so that they stay exact towards the angle 0.
    first = np.sinc(angle / np.pi)
    second = 0.5 * np.sinc(angle / (2 * np.pi)) ** 2
    rotation: Float64 = np.eye(3) + first * cross + second * (cross @ cross)
    return rotation


def angle_between_rotations(first: Float64, second: Float64) -> Float64:
    """Angle in radians [...] between rotations [..., 3, 3]; exact for small angles too."""
    difference = first - second
    chord = np.linalg.norm(difference, axis=(-2, -1)) / np.sqrt(8.0)
    angle: Float64 = 2 * np.arcsin(np.clip(chord, 0.0, 1.0))
    return angle
