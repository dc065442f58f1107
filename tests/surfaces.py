"""Photos of a smooth surface under a texture without sharp edges: where each of its points lies is exact.

    from tests.surfaces import Surface, Texture, arc

    surface = Surface(bumps=0.1)
    views = arc(5)                              # cameras that satisfy refinement's Geometry together
    photos = [surface.photograph(views, image) for image in range(5)]
    points = surface.seen_at(views, 0, xy)      # [M, 3] what image 0 shows at pixels [M, 2]

The texture is a sum of waves that are long against a pixel, so that a value at a pixel's centre is also its mean, and
that nothing needs to be drawn finer than the photo.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mast3r_sfm.geometry.rigid import camera_centre
from mast3r_sfm.synthetic.cameras import look_at
from mast3r_sfm.synthetic.render import pixel_centres
from mast3r_sfm.types import Float32, Float64

MEAN, CONTRAST = 128.0, 32.0
"""Of the grey values: mean and standard deviation; four of these fit into 0..255."""


@dataclass(frozen=True, kw_only=True)
class Texture:
    """A sum of plane waves of random directions."""

    seed: int = 0
    shortest: float = 6.0
    """Shortest and longest wave, in the units of the places that are asked for."""
    longest: float = 40.0
    waves: int = 32

    def __call__(self, places: Float64) -> Float64:
        """Grey values [...] at places [..., 2]."""
        rng = np.random.default_rng([self.seed, 21])
        angle = rng.uniform(0, 2 * np.pi, self.waves)
        length = np.geomspace(self.shortest, self.longest, self.waves)
        direction = np.stack([np.cos(angle), np.sin(angle)]) * 2 * np.pi / length
        phase = rng.uniform(0, 2 * np.pi, self.waves)
        # The sine of float32 is several times as fast, and errs by less than a ten-thousandth of a grey value.
        waves = np.sin((places @ direction + phase).astype(np.float32)).sum(axis=-1, dtype=np.float64)
        grey: Float64 = MEAN + CONTRAST * np.sqrt(2 / self.waves) * waves
        return grey


@dataclass(frozen=True, kw_only=True)
class Pinholes:
    """Cameras of one focal length without distortion."""

    poses: Float64
    """[N, 3, 4] cam_from_world."""
    focal_px: float = 320.0
    width_px: int = 320
    height_px: int = 240

    @property
    def centre_px(self) -> Float64:
        """[2] the principal point."""
        return np.array([self.width_px / 2, self.height_px / 2])

    def size(self, image: int) -> tuple[int, int]:
        """Width and height of an image."""
        if not 0 <= image < len(self.poses):
            raise IndexError(image)
        return self.width_px, self.height_px

    def project(self, image: int, points: Float64) -> Float64:
        """World points [M, 3] to pixels [M, 2]; NaN behind the camera."""
        local = points @ self.poses[image, :, :3].T + self.poses[image, :, 3]
        depth = np.where(local[:, 2] > 0, local[:, 2], np.nan)
        return self.focal_px * local[:, :2] / depth[:, None] + self.centre_px

    def viewing_rays(self, image: int, xy: Float64) -> tuple[Float64, Float64]:
        """The camera's centre [3] and the unit directions [M, 3] of pixels."""
        local = np.concatenate([(xy - self.centre_px) / self.focal_px, np.ones((len(xy), 1))], axis=1)
        rays = local @ self.poses[image, :, :3]
        return camera_centre(self.poses[image]), rays / np.linalg.norm(rays, axis=1, keepdims=True)


def arc(
    number: int, *, turn_deg: float = 40.0, distance: float = 4.0, rolls: tuple[float, ...] = (), **values: float
) -> Pinholes:
    """Cameras on an arc, at uneven heights, that look at the origin from negative z; `rolls` in radians."""
    angles = np.radians(turn_deg) * np.linspace(-0.5, 0.5, number)
    places = distance * np.stack([np.sin(angles), 0.1 * np.sin(5 * angles), -np.cos(angles)], axis=1)
    turns = [*rolls, *[0.0] * (number - len(rolls))]
    poses = [look_at(place, np.zeros(3), roll) for place, roll in zip(places, turns, strict=True)]
    return Pinholes(poses=np.stack(poses), **values)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Surface:
    """z = slope · x + bumps some one wide and `bumps` high, to be seen from negative z."""

    texture: Texture = field(default_factory=lambda: Texture(shortest=0.075, longest=0.5))
    bumps: float = 0.0
    slope: float = 0.0

    def height(self, x: Float64, y: Float64) -> Float64:
        """z [...] of the surface at places [...]."""
        bumpy: Float64 = self.slope * x + self.bumps * np.sin(2.1 * x + 0.4) * np.cos(1.7 * y - 0.3)
        return bumpy

    def seen_at(self, cameras: Pinholes, image: int, xy: Float64) -> Float64:
        """The points [M, 3] that an image shows at pixels [M, 2]."""
        centre, rays = cameras.viewing_rays(image, xy)
        along = np.zeros(len(rays))
        for _ in range(30):
            points = centre + along[:, None] * rays
            # Newton's step, but for the bumps' own slope, which is small.
            step = (points[:, 2] - self.height(points[:, 0], points[:, 1])) / (rays[:, 2] - self.slope * rays[:, 0])
            along = along - step
            if np.abs(step).max(initial=0.0) < 1e-9:
                break
        return centre + along[:, None] * rays

    def photograph(self, cameras: Pinholes, image: int) -> Float32:
        """Grey values [H, W]."""
        points = self.seen_at(cameras, image, pixel_centres(cameras.width_px, cameras.height_px))
        grey = self.texture(points[:, :2]).reshape(cameras.height_px, cameras.width_px)
        return grey.clip(0, 255).astype(np.float32)
