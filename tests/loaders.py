"""What the programs that train on COLMAP models ask of them, as rules that a model either keeps or breaks.

nerfstudio and gsplat read cameras.bin, images.bin and points3D.bin by themselves, and take models of a few kinds of
lenses; 3D Gaussian splatting as published takes undistorted ones alone. `broken_rules` gives what is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from tests.colmap_files import StoredModel, read_stored

ANY_LENS = frozenset(("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE"))
"""What nerfstudio and gsplat both understand."""
UNDISTORTED = frozenset(("SIMPLE_PINHOLE", "PINHOLE"))
"""What 3D Gaussian splatting understands."""


def broken_rules(folder: Path, photos: Path, models: Collection[str]) -> list[str]:
    """What a loader would stumble over in the model in `folder`, of the photos below `photos`."""
    return list(broken(read_stored(folder), photos, models))


def broken(model: StoredModel, photos: Path, models: Collection[str]) -> Iterator[str]:
    """As `broken_rules`, of a model that was read."""
    if not model.images or not model.points:
        yield "nothing to train on"
    yield from _cameras(model, models)
    yield from _images(model, photos)
    yield from _points(model)
    yield from _geometry(model)


def keypoints_outside(model: StoredModel) -> list[str]:
    """Images with keypoints outside of them. Undistortion crops photos and keeps keypoints, and nobody minds."""
    sizes = {number: (camera.width, camera.height) for number, camera in model.cameras.items()}
    return [
        image.name for image in model.images.values() if not ((image.xy >= 0) & (image.xy <= sizes[image.camera])).all()
    ]


def _cameras(model: StoredModel, models: Collection[str]) -> Iterator[str]:
    for number, camera in model.cameras.items():
        if camera.model not in models:
            yield f"camera {number} is a {camera.model}"
        focal = camera.params[: 1 if camera.model.startswith("SIMPLE") or camera.model == "RADIAL" else 2]
        centre = np.array(camera.params[len(focal) : len(focal) + 2])
        if not np.isfinite(camera.params).all() or min(focal) <= 0:
            yield f"camera {number} has impossible parameters"
        if not ((centre > 0) & (centre < [camera.width, camera.height])).all():
            yield f"camera {number} has its principal point outside of the photo"


def _images(model: StoredModel, photos: Path) -> Iterator[str]:
    for name, count in Counter(image.name for image in model.images.values()).items():
        if count > 1:
            yield f"{name} stands in the model twice"
    for image in model.images.values():
        path = PurePosixPath(image.name)
        if path.is_absolute() or ".." in path.parts or "\\" in image.name or not (photos / image.name).is_file():
            yield f"{image.name} is not found below the photos"
            continue
        if image.camera not in model.cameras:
            yield f"{image.name} has no camera"
            continue
        with Image.open(photos / image.name) as photo:
            size = photo.size  # as stored: no loader applies the orientation
        camera = model.cameras[image.camera]
        if size != (camera.width, camera.height):
            yield f"{image.name} has {size} pixels and its camera {(camera.width, camera.height)}"
        if abs(np.linalg.norm(image.quaternion) - 1) > 1e-9 or not np.isfinite(image.translation).all():
            yield f"{image.name} has an impossible pose"


def _points(model: StoredModel) -> Iterator[str]:
    seen = {
        (number, keypoint): int(point)
        for number, image in model.images.items()
        for keypoint, point in enumerate(image.points)
        if point != -1
    }
    for (number, keypoint), point in seen.items():
        if point not in model.points:
            yield f"keypoint {keypoint} of image {number} names the point {point}, which does not exist"
    told = Counter(element for point in model.points.values() for element in point.track)
    for element, count in told.items():
        if count > 1:
            yield f"keypoint {element} stands in {count} tracks"
    for number, point in model.points.items():
        if len({image for image, _ in point.track}) < max(len(point.track), 2):
            yield f"point {number} is not seen by two images, or twice by one"
        if any(seen.get(element) != number for element in point.track):
            yield f"point {number} has a keypoint that does not name it"
        if not np.isfinite(point.xyz).all() or not point.error >= 0:
            yield f"point {number} is nowhere, or has no error"
    if len(told) != len(seen):
        yield f"{len(seen)} keypoints name a point, and {len(told)} stand in tracks"


def _geometry(model: StoredModel) -> Iterator[str]:
    """That poses are cam_from_world with w first: only then do points lie before the cameras, where they project."""
    for image in model.images.values():
        mine = image.points >= 0
        xyz = [model.points[point].xyz for point in image.points[mine].tolist() if point in model.points]
        if not xyz or len(xyz) != mine.sum() or image.camera not in model.cameras:
            continue
        local, camera = image.local(np.array(xyz)), model.cameras[image.camera]
        if (local[:, 2] <= 0).any():
            yield f"{image.name} sees points behind it"
            continue
        pinholes = 1 if camera.model.startswith("SIMPLE") or camera.model == "RADIAL" else 2
        focal, centre = np.array(camera.params[:pinholes]), np.array(camera.params[pinholes : pinholes + 2])
        away = np.linalg.norm(local[:, :2] / local[:, 2:] * focal + centre - image.xy[mine], axis=1)
        # Distortion is left out; it moves a pixel by far less than a wrong pose does.
        if np.median(away) > 0.01 * max(camera.width, camera.height):
            yield f"{image.name} does not see its points where they are"
