"""Scenes of boxes and spheres inside a closed room, with exact ray intersection.

Every ray from inside hits something, so every pixel of a view has a true depth. World axes are x right, y down, z
forward, as a camera's; one world unit is about a metre.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.synthetic.texture import Material
from mast3r_sfm.types import Float64

Vector = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Hits:
    """Where rays meet one body."""

    distance: Float64
    """[K] in lengths of the ray's direction; infinite where the ray misses."""
    normal: Float64
    """[K, 3] unit length, in the world, towards the viewer; meaningless where the ray misses."""
    uv: Float64
    """[K, 2] surface coordinates in world units."""
    face: NDArray[np.uint32]
    """[K] number of the face."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box turned about the vertical axis, seen from outside, or from inside where it is hollow."""

    centre: Vector
    half_size: Vector
    material: Material
    yaw: float = 0.0
    """Radians about the world's y axis."""
    hollow: bool = False

    def __post_init__(self) -> None:
        if min(self.half_size) <= 0:
            raise ShapeError(f"Box.half_size {self.half_size} must be positive")

    def contains(self, point: Float64) -> bool:
        """Tell whether a world point [3] lies inside."""
        return bool((np.abs((point - np.array(self.centre)) @ self._axes().T) < np.array(self.half_size)).all())

    def distances(self, origin: Float64, directions: Float64) -> Float64:
        """[K] distance along the rays from [3] with directions [K, 3]; infinite where they miss."""
        near, far = self._slabs(origin, directions)
        enter = np.maximum(np.maximum(near[0], near[1]), near[2])
        leave = np.minimum(np.minimum(far[0], far[1]), far[2])
        reached = leave if self.hollow else enter
        return np.where((enter <= leave) & (reached > 1e-9), reached, np.inf)

    def hits(self, origin: Float64, directions: Float64) -> Hits:
        """Intersect rays that are known to hit, with normals and surface coordinates."""
        axes = self._axes()
        near, far = self._slabs(origin, directions)
        axis = far.argmin(axis=0) if self.hollow else near.argmax(axis=0)
        distance = far.min(axis=0) if self.hollow else near.max(axis=0)
        local = (origin + distance[:, None] * directions - np.array(self.centre)) @ axes.T
        rows = np.arange(len(directions))
        side = np.sign(local[rows, axis])
        normal = axes[axis] * (side * (-1.0 if self.hollow else 1.0))[:, None]
        # x and z faces keep the vertical as second coordinate, so that rows of bricks lie level.
        first = np.where(axis == 0, local[:, 2], local[:, 0])
        second = np.where(axis == 1, local[:, 2], local[:, 1])
        face = (2 * axis + (side > 0)).astype(np.uint32)
        return Hits(distance=distance, normal=normal, uv=np.stack([first, second], axis=-1), face=face)

    def _axes(self) -> Float64:
        """[3, 3] rows: the box's axes in the world."""
        cosine, sine = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[cosine, 0.0, sine], [0.0, 1.0, 0.0], [-sine, 0.0, cosine]])

    def _slabs(self, origin: Float64, directions: Float64) -> tuple[Float64, Float64]:
        """Distances [3, K] at which the rays enter and leave each pair of parallel faces."""
        axes = self._axes()
        start = axes @ (origin - np.array(self.centre))
        step = axes @ directions.T
        # A ray parallel to a face gets a tiny slope instead of a division by zero.
        inverse = 1 / np.where(np.abs(step) < 1e-12, 1e-12, step)
        middle, reach = -start[:, None] * inverse, np.array(self.half_size)[:, None] * np.abs(inverse)
        return middle - reach, middle + reach


@dataclass(frozen=True, kw_only=True)
class Sphere:
    """A ball seen from outside. Its surface coordinates are those of the six faces of a cube around it."""

    centre: Vector
    radius: float
    material: Material

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise ShapeError(f"Sphere.radius {self.radius} must be positive")

    def distances(self, origin: Float64, directions: Float64) -> Float64:
        """[K] distance along the rays; infinite where they miss."""
        offset = origin - np.array(self.centre)
        squared = np.einsum("ki,ki->k", directions, directions)
        half = np.einsum("ki,ki->k", np.broadcast_to(offset, directions.shape), directions)
        root = half**2 - squared * ((offset**2).sum(axis=-1) - self.radius**2)
        reached = (-half - np.sqrt(np.maximum(root, 0.0))) / squared
        return np.where((root > 0) & (reached > 1e-9), reached, np.inf)

    def hits(self, origin: Float64, directions: Float64) -> Hits:
        """Intersect rays that are known to hit, with normals and surface coordinates."""
        distance = self.distances(origin, directions)
        normal = (origin + distance[:, None] * directions - np.array(self.centre)) / self.radius
        axis = np.abs(normal).argmax(axis=-1)
        rows = np.arange(len(normal))
        main = normal[rows, axis]
        others = np.stack([normal[rows, (axis + 1) % 3], normal[rows, (axis + 2) % 3]], axis=-1)
        face = (2 * axis + (main > 0)).astype(np.uint32)
        # The angle rather than the tangent keeps the texture's scale nearly even over each cube face.
        uv = np.arctan(others / np.abs(main)[:, None]) * self.radius
        return Hits(distance=distance, normal=normal, uv=uv, face=face)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Bodies inside a hollow box, lit by one point light that casts shadows."""

    enclosure: Box
    bodies: tuple[Box | Sphere, ...]
    light: Vector
    ambient: float = 0.5
    """Share of the light that comes from everywhere."""

    def __post_init__(self) -> None:
        if not self.enclosure.hollow:
            raise ShapeError("Scene.enclosure must be hollow")

    @property
    def surfaces(self) -> tuple[Box | Sphere, ...]:
        """Enclosure and bodies."""
        return (self.enclosure, *self.bodies)

    def nearest(self, origin: Float64, directions: Float64) -> tuple[Float64, NDArray[np.int64]]:
        """First surface on each ray from one point.

        Args:
            origin: [3].
            directions: [K, 3].

        Returns:
            [K] distance in lengths of the ray's direction; [K] index into `surfaces`.
        """
        best = self.enclosure.distances(origin, directions)
        index = np.zeros(len(directions), dtype=np.int64)
        towards = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
        for number, body in enumerate(self.bodies, start=1):
            rays = _rays_near(body, origin, towards)
            distance = body.distances(origin, directions[rays])
            closer = distance < best[rays]
            best[rays[closer]], index[rays[closer]] = distance[closer], number
        return best, index

    def is_lit(self, points: Float64) -> NDArray[np.bool_]:
        """[K] whether the light reaches points [K, 3] of surfaces."""
        light = np.array(self.light)
        # The rounding of a point that lies on a surface must not shade it: a ten-thousandth is given away.
        lit: NDArray[np.bool_] = self.nearest(light, points - light)[0] > 1 - 1e-4
        return lit


def _rays_near(body: Box | Sphere, origin: Float64, towards: Float64) -> NDArray[np.int64]:
    """Indices of the rays (unit directions [K, 3]) that pass through the sphere around a body."""
    radius = body.radius if isinstance(body, Sphere) else float(np.linalg.norm(body.half_size))
    offset = np.array(body.centre) - origin
    distance = float(np.linalg.norm(offset))
    if distance <= radius:
        return np.arange(len(towards))
    return np.flatnonzero(towards @ (offset / distance) >= np.sqrt(1 - (radius / distance) ** 2) - 1e-9)
