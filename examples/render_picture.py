"""Draw a COLMAP model as a PNG: its points in their colours and its cameras as thin pyramids, from half aside.

python examples/render_picture.py MODEL OUT.png [--size 1280 800] [--azimuth 28] [--elevation 16]

MODEL is a COLMAP model, or the output folder of a reconstruction, whose largest model is drawn.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycolmap
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]

BACKGROUND = (14, 17, 22)
FRUSTUM = (255, 176, 59)
OVERSAMPLING = 3


@dataclass(frozen=True, kw_only=True)
class Drawable:
    """Things to draw, as points with colour and size."""

    points: Array
    """[K, 3]."""
    colours: NDArray[np.uint8]
    """[K, 3]."""
    radius_px: Array
    """[K] of the disc that is painted, before the picture is shrunk."""


@dataclass(frozen=True, kw_only=True)
class Eye:
    """Where the picture is drawn from."""

    rotation: Array
    """[3, 3] rows: right, down, forward."""
    position: Array
    focal_px: float
    centre_px: Array

    def project(self, points: Array) -> tuple[Array, Array]:
        """Points [K, 3] to pixels [K, 2] and depth [K]."""
        local = (points - self.position) @ self.rotation.T
        return local[:, :2] / np.maximum(local[:, 2:], 1e-9) * self.focal_px + self.centre_px, local[:, 2]


def normalised(vector: Array) -> Array:
    """The vector at unit length."""
    return vector / np.linalg.norm(vector)


def read_points(model: pycolmap.Reconstruction) -> tuple[Array, NDArray[np.uint8]]:
    """Positions [K, 3] and colours [K, 3] of the points that at least three photos see and that are not far off."""
    kept = [point for point in model.points3D.values() if point.track.length() >= 3] or list(model.points3D.values())
    points = np.array([point.xyz for point in kept]).reshape(-1, 3)
    colours = np.array([point.color for point in kept], dtype=np.uint8).reshape(-1, 3)
    distance = np.linalg.norm(points - np.median(points, axis=0), axis=1)
    near = distance < 4 * np.median(distance) + 1e-9
    return points[near], colours[near]


def read_cameras(model: pycolmap.Reconstruction) -> tuple[Array, Array]:
    """Poses world_from_cam [N, 3, 4] in order of the names, and the half widths and heights [N, 2] at depth 1."""
    images = sorted(model.images.values(), key=lambda image: image.name)
    images = [image for image in images if image.has_pose]
    poses = np.array([image.cam_from_world().inverse().matrix() for image in images])
    halves = [
        (camera.width / (2 * camera.mean_focal_length()), camera.height / (2 * camera.mean_focal_length()))
        for camera in (model.cameras[image.camera_id] for image in images)
    ]
    return poses, np.array(halves)


def scene_axes(points: Array, poses: Array) -> Array:
    """Rows right, down, forward of the scene, [3, 3], from the cameras and the points' principal axes."""
    down = poses[:, :, 1].mean(axis=0)
    if np.linalg.norm(down) < 0.2:
        # The photos are turned all ways: the thinnest direction of the points serves as the vertical.
        down = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)[2][2]
    down = normalised(down)
    forward = poses[:, :, 2].mean(axis=0)
    forward -= down * (forward @ down)
    if np.linalg.norm(forward) < 0.3:
        # The cameras stand around the scene: look across its longest level direction.
        level = points - points.mean(axis=0)
        level = level - np.outer(level @ down, down)
        forward = np.cross(down, np.linalg.svd(level, full_matrices=False)[2][0])
    forward = normalised(forward)
    return np.stack([np.cross(down, forward), down, forward])


def place_eye(subject: Array, axes: Array, angles: tuple[float, float], size: tuple[int, int]) -> Eye:
    """Turn the scene's axes by azimuth and elevation in radians, and step back until all of `subject` is in view."""
    azimuth, elevation = angles
    sine, cosine = np.sin(azimuth), np.cos(azimuth)
    forward = cosine * axes[2] - sine * axes[0]
    right = cosine * axes[0] + sine * axes[2]
    look = normalised(np.cos(elevation) * forward + np.sin(elevation) * axes[1])
    rotation = np.stack([right, np.cross(look, right), look])
    focal = 1.5 * max(size)
    local = (subject - subject.mean(axis=0)) @ rotation.T
    # A point (x, z) is inside a border at slope s when |x| <= s (z + d): the outermost points give the distance d and
    # the shift that centres the scene between the borders.
    shift, distance = np.zeros(3), 0.0
    for axis in (0, 1):
        slope = 0.47 * size[axis] / focal
        low = np.max(-local[:, axis] - slope * local[:, 2])
        high = np.max(local[:, axis] - slope * local[:, 2])
        shift[axis] = (high - low) / 2
        distance = max(distance, (high + low) / (2 * slope))
    position = subject.mean(axis=0) + (shift - np.array([0.0, 0.0, distance])) @ rotation
    return Eye(rotation=rotation, position=position, focal_px=focal, centre_px=np.array(size) / 2)


def frustum_lines(poses: Array, halves: Array, depth: float) -> Array:
    """[L, 2, 3] ends of the edges of all pyramids, with a tick on top of each."""
    x, y = halves[:, 0], halves[:, 1]
    one, zero = np.ones_like(x), np.zeros_like(x)
    corners = [(-x, -y, one), (x, -y, one), (x, y, one), (-x, y, one)]
    tick = [(-0.4 * x, -1.15 * y, one), (zero, -1.6 * y, one), (0.4 * x, -1.15 * y, one)]
    local = np.stack([np.stack(corner, axis=-1) for corner in ((zero, zero, zero), *corners, *tick)], axis=1) * depth
    world = local @ np.swapaxes(poses[:, :, :3], 1, 2) + poses[:, None, :, 3]
    edges = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 1), (5, 6), (6, 7), (7, 5)]
    return world[:, edges].reshape(-1, 2, 3)


def draw_lines(lines: Array, eye: Eye, colour: tuple[int, int, int], radius_px: float) -> Drawable:
    """Lines [L, 2, 3] as points close enough to each other to look solid."""
    ends, _ = eye.project(lines.reshape(-1, 3))
    length = np.linalg.norm(np.diff(ends.reshape(-1, 2, 2), axis=1), axis=-1).max(initial=1.0)
    along = np.linspace(0.0, 1.0, int(1.5 * length) + 2)[:, None, None]
    points = (lines[:, 0] * (1 - along) + lines[:, 1] * along).reshape(-1, 3)
    colours = np.tile(np.array(colour, dtype=np.uint8), (len(points), 1))
    return Drawable(points=points, colours=colours, radius_px=np.full(len(points), radius_px))


def draw_points(points: Array, colours: NDArray[np.uint8], eye: Eye) -> Drawable:
    """The model's points, larger where they are few and where they are near."""
    _, depth = eye.project(points)
    usual = np.clip(250.0 / np.sqrt(len(points)), 0.7, 3.2) * OVERSAMPLING
    brighter = 255 * (colours / 255.0) ** 0.75
    radius = np.clip(usual * np.median(depth) / np.maximum(depth, 1e-9), 1.0, 2 * usual)
    return Drawable(points=points, colours=brighter.astype(np.uint8), radius_px=radius)


def paint(things: list[Drawable], eye: Eye, size: tuple[int, int]) -> Image.Image:
    """Paint all discs from far to near, so that near ones cover far ones."""
    width, height = size
    picture = np.empty((height, width, 3), dtype=np.uint8)
    picture[:] = BACKGROUND
    radius = np.concatenate([thing.radius_px for thing in things])
    largest_first = np.argsort(-radius, kind="stable")
    radius = radius[largest_first]
    xy, depth = eye.project(np.concatenate([thing.points for thing in things])[largest_first])
    colours = np.concatenate([thing.colours for thing in things])[largest_first]
    corner = np.floor(np.clip(xy, -1e6, 1e6)).astype(np.int64)
    reach = int(np.ceil(radius.max(initial=0.0)))
    pixels, owners = [], []
    for offset in np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T:
        count = np.searchsorted(-radius, -np.hypot(*offset), side="right")
        pixel = corner[:count] + offset
        seen = (pixel >= 0).all(axis=1) & (pixel < (width, height)).all(axis=1) & (depth[:count] > 1e-6)
        pixels.append(pixel[seen])
        owners.append(np.flatnonzero(seen))
    pixel, owner = np.concatenate(pixels), np.concatenate(owners)
    # Where pixels repeat, numpy keeps the last, which is the nearest.
    far_first = np.argsort(-depth[owner], kind="stable")
    pixel, owner = pixel[far_first], owner[far_first]
    picture[pixel[:, 1], pixel[:, 0]] = colours[owner]
    return Image.fromarray(picture)


def draw(model: pycolmap.Reconstruction, size: tuple[int, int], angles: tuple[float, float]) -> Image.Image:
    """The whole picture, at `size`, seen from `angles` (azimuth, elevation in radians)."""
    points, colours = read_points(model)
    poses, halves = read_cameras(model)
    centres = poses[:, :, 3]
    fine = (OVERSAMPLING * size[0], OVERSAMPLING * size[1])
    # The few outermost points may leave the picture; the cameras may not.
    middle = np.median(points, axis=0)
    order = np.argsort(np.linalg.norm(points - middle, axis=1))
    subject = np.concatenate([points[order[: int(0.97 * len(order)) + 1]], centres])
    eye = place_eye(subject, scene_axes(points, poses), angles, fine)
    extent = np.linalg.norm(np.percentile(subject, 90, axis=0) - np.percentile(subject, 10, axis=0))
    spacing = np.median(np.linalg.norm(np.diff(centres, axis=0), axis=1)) if len(centres) > 1 else extent
    depth = float(np.clip(0.6 * spacing, 0.02 * extent, 0.06 * extent))
    things = [
        draw_points(points, colours, eye),
        draw_lines(frustum_lines(poses, halves, depth), eye, FRUSTUM, 0.4 * OVERSAMPLING),
    ]
    return paint(things, eye, fine).resize(size, Image.Resampling.BOX)


def main() -> None:
    """Parse the arguments, draw, write."""
    parser = argparse.ArgumentParser(description="Draw a COLMAP model as a PNG.")
    parser.add_argument("model", type=Path, help="a COLMAP model, or a folder with sparse/0")
    parser.add_argument("output", type=Path, help="the PNG to write")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 800), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--azimuth", type=float, default=28.0, help="degrees aside from where the cameras look")
    parser.add_argument("--elevation", type=float, default=16.0, help="degrees above")
    arguments = parser.parse_args()
    inner = arguments.model / "sparse" / "0"
    model = pycolmap.Reconstruction(inner if inner.is_dir() else arguments.model)
    if not model.num_points3D() or not model.num_reg_images():
        parser.error(f"{arguments.model} holds no points or no images; there is nothing to draw")
    width, height = arguments.size
    angles = (float(np.radians(arguments.azimuth)), float(np.radians(arguments.elevation)))
    picture = draw(model, (width, height), angles)
    picture.save(arguments.output, optimize=True)
    print(f"{arguments.output}: {model.num_points3D()} points and {model.num_reg_images()} cameras")


if __name__ == "__main__":
    main()
