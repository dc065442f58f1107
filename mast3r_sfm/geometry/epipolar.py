"""Two views: epipolar errors, rays, triangulation and rotation between bundles of rays (Hartley & Zisserman, 2004)."""

from __future__ import annotations

import numpy as np

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Float64


def homogeneous(xy: Float64) -> Float64:
    """[M, 2] → [M, 3] with a last coordinate of 1."""
    return np.concatenate([xy, np.ones((len(xy), 1))], axis=1)


def sampson_error(fundamental: Float64, first: Float64, second: Float64) -> Float64:
    """Sampson distance [M] in pixels of matches [M, 2] from x₂ᵀ F x₁ = 0 (HZ 11.9)."""
    line_second = homogeneous(first) @ fundamental.T
    line_first = homogeneous(second) @ fundamental
    value = np.abs((homogeneous(second) * line_second).sum(axis=1))
    slope = (line_second[:, :2] ** 2).sum(axis=1) + (line_first[:, :2] ** 2).sum(axis=1)
    error: Float64 = value / np.sqrt(np.maximum(slope, 1e-300))
    return error


def rays(xy: Float64, focal_px: float, centre_px: Float64) -> Float64:
    """Unit viewing directions [M, 3] in the camera frame of pixels [M, 2] of a pinhole camera."""
    directions = homogeneous((xy - centre_px) / focal_px)
    unit: Float64 = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return unit


def rotation_between(first: Float64, second: Float64) -> Float64:
    """The rotation R [3, 3] that brings unit rays [M, 3] closest to others: min Σ‖second − R first‖² (Kabsch 1976)."""
    if len(first) < 2:
        raise ShapeError(f"a rotation needs at least 2 rays, not {len(first)}")
    left, _, right = np.linalg.svd(second.T @ first)
    sign = np.sign(np.linalg.det(left @ right))
    rotation: Float64 = left @ np.diag([1.0, 1.0, sign]) @ right
    return rotation


def triangulate(second_from_first: Float64, first: Float64, second: Float64) -> tuple[Float64, Float64]:
    """Points midway between two rays each, where they come closest.

    Args:
        second_from_first: [3, 4] relative pose.
        first: [M, 3] unit rays in the first camera's frame.
        second: [M, 3] unit rays in the second camera's frame.

    Returns:
        [M, 3] points in the first camera's frame, at most 1e6 baselines away; points whose depth along either ray is
        negative come back with a negative depth. [M] angle between the rays in radians.
    """
    rotation, translation = second_from_first[:, :3], second_from_first[:, 3]
    turned = second @ rotation  # rays of the second camera in the first camera's frame
    centre = -rotation.T @ translation
    cosine = (first * turned).sum(axis=1)
    cross = np.linalg.norm(np.cross(first, turned), axis=1)
    angle = np.arctan2(cross, cosine)
    along_first, along_second = first @ centre, turned @ centre
    determinant = np.maximum(cross**2, 1e-12)
    depth_first = (along_first - cosine * along_second) / determinant
    depth_second = (cosine * along_first - along_second) / determinant
    points = (depth_first[:, None] * first + centre + depth_second[:, None] * turned) / 2
    behind = (depth_first <= 0) | (depth_second <= 0)
    flipped = np.where((behind & (points[:, 2] > 0))[:, None], -points, points)
    limit = 1e6 * max(float(np.linalg.norm(translation)), 1e-12)
    distance = np.linalg.norm(flipped, axis=1, keepdims=True)
    clipped: Float64 = flipped * np.minimum(1.0, limit / np.maximum(distance, 1e-300))
    return clipped, angle
