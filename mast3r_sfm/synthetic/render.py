"""Exact views of a scene by ray casting: colour by area average, depth and points at the pixel centres."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.errors import ConfigError, InputError, ShapeError
from mast3r_sfm.synthetic.cameras import Kind, PosedCamera, make_cameras
from mast3r_sfm.synthetic.scene import Scene
from mast3r_sfm.synthetic.scenes import make_scene
from mast3r_sfm.synthetic.texture import surface_colour
from mast3r_sfm.types import Float64

_RAYS_AT_ONCE = 1 << 16
"""Small enough that the arrays of one step stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A photo with its truth."""

    image: NDArray[np.uint8]
    """[H, W, 3] sRGB."""
    depth: Float64
    """[H, W] z in the camera frame at the pixel centres; always positive."""
    points_world: Float64
    """[H, W, 3] the surface points at the pixel centres."""
    camera: PosedCamera

    def __post_init__(self) -> None:
        size = (self.camera.height_px, self.camera.width_px)
        if self.image.shape != (*size, 3) or self.depth.shape != size or self.points_world.shape != (*size, 3):
            raise ShapeError(f"View: image, depth and points must all have the camera's size {size}")

    @property
    def cam_from_world(self) -> Float64:
        """[3, 4]."""
        return self.camera.cam_from_world

    @property
    def K(self) -> Float64:
        """[3, 3] intrinsics in COLMAP's pixels."""
        return self.camera.intrinsics


def pixel_centres(width_px: int, height_px: int) -> Float64:
    """[H·W, 2] COLMAP coordinates of the pixel centres, row by row."""
    x, y = np.meshgrid(np.arange(width_px) + 0.5, np.arange(height_px) + 0.5)
    return np.stack([x.ravel(), y.ravel()], axis=-1)


def render(scene: Scene, camera: PosedCamera, *, samples: int = 2) -> View:
    """Photograph a scene.

    Args:
        scene: what to see.
        camera: from where; its centre must lie inside the scene's enclosure.
        samples: colour rays per pixel and axis.

    Raises:
        ConfigError: `samples` is not positive.
        InputError: the camera stands outside the enclosure.
    """
    if samples < 1:
        raise ConfigError(f"samples = {samples}: must be at least 1")
    if not scene.enclosure.contains(camera.centre):
        raise InputError(f"the camera at {camera.centre.round(3).tolist()} is outside the scene; move it inside")
    xy = pixel_centres(camera.width_px, camera.height_px)
    depth = np.concatenate([_depths(scene, camera, part) for part in _parts(xy)])
    local = camera.rays(xy) * depth[:, None]
    points = (local - camera.cam_from_world[:, 3]) @ camera.cam_from_world[:, :3]
    steps = (np.arange(samples) + 0.5) / samples - 0.5
    offsets = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    fine = (xy[:, None] + offsets).reshape(-1, 2)
    colour = np.concatenate([_colours(scene, camera, part, samples) for part in _parts(fine)])
    size = (camera.height_px, camera.width_px)
    return View(
        image=_to_srgb(colour.reshape(-1, samples**2, 3).mean(axis=1)).reshape(*size, 3),
        depth=depth.reshape(size),
        points_world=points.reshape(*size, 3),
        camera=camera,
    )


def make_views(
    kind: Kind, number: int, *, width_px: int = 640, height_px: int = 480, seed: int = 0, samples: int = 2
) -> dict[str, View]:
    """Make a scene and photograph it along its path; names are `0000.jpg`, `0001.jpg`, … in order of the path.

    Raises:
        ConfigError: as `make_cameras` and `render` do.
    """
    scene = make_scene(kind, seed)
    cameras = make_cameras(kind, number, width_px=width_px, height_px=height_px, seed=seed)
    return {f"{index:04d}.jpg": render(scene, camera, samples=samples) for index, camera in enumerate(cameras)}


def _parts(xy: Float64) -> list[Float64]:
    return np.array_split(xy, max(1, -(-len(xy) // _RAYS_AT_ONCE)))


def _depths(scene: Scene, camera: PosedCamera, xy: Float64) -> Float64:
    # Rays have z = 1 in the camera frame, so the distance along them is the depth.
    return scene.nearest(camera.centre, camera.rays(xy) @ camera.cam_from_world[:, :3])[0]


def _colours(scene: Scene, camera: PosedCamera, xy: Float64, samples: int) -> Float64:
    """Linear RGB [K, 3] seen at pixels [K, 2]."""
    directions = camera.rays(xy) @ camera.cam_from_world[:, :3]
    depth, index = scene.nearest(camera.centre, directions)
    colour, normal = np.zeros((len(xy), 3)), np.zeros((len(xy), 3))
    for number, surface in enumerate(scene.surfaces):
        seen = np.flatnonzero(index == number)
        if len(seen) == 0:
            continue
        hits = surface.hits(camera.centre, directions[seen])
        normal[seen] = hits.normal
        length = np.linalg.norm(directions[seen], axis=-1)
        cosine = np.abs(np.einsum("ki,ki->k", directions[seen], hits.normal)) / length
        # Between the footprint across and along the slope: sharp on slanted surfaces without much aliasing.
        footprint = depth[seen] / (camera.intrinsics[0, 0] * samples * np.sqrt(np.maximum(cosine, 0.05)))
        uv, footprint = hits.uv.astype(np.float32), footprint.astype(np.float32)
        colour[seen] = surface_colour(surface.material, uv, hits.face, footprint)
    points = camera.centre + depth[:, None] * directions
    towards = np.array(scene.light) - points
    towards /= np.linalg.norm(towards, axis=-1, keepdims=True)
    lambert = np.clip(np.einsum("ki,ki->k", normal, towards), 0.0, 1.0) * scene.is_lit(points)
    shaded: Float64 = colour * (scene.ambient + (1 - scene.ambient) * lambert)[:, None]
    return shaded


def _to_srgb(linear: Float64) -> NDArray[np.uint8]:
    """Gamma of sRGB (IEC 61966-2-1), rounded to bytes."""
    value = np.clip(linear, 0.0, 1.0)
    curve = np.where(value <= 0.0031308, 12.92 * value, 1.055 * value ** (1 / 2.4) - 0.055)
    return np.round(255 * curve).astype(np.uint8)
