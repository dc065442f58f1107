"""Cameras and poses of COLMAP's files, to the bit."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pycolmap

from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.errors import InputError
from mast3r_sfm.types import Camera, Float64

_MAX_CAMERAS = 10_000_000


def make_camera(model: str, size: tuple[int, int], params: Float64, where: str) -> Camera:
    """A camera that was given, checked.

    Args:
        model: COLMAP's name.
        size: width and height in photo pixels.
        params: in COLMAP's order.
        where: what an error is about.

    Raises:
        InputError: there is no such model, or the parameters are not its own.
    """
    if model not in pycolmap.CameraModelId.__members__ or model == "INVALID":
        raise InputError(f"{where}: COLMAP has no camera model {model!r}")
    camera = pycolmap.Camera(model=model, width=size[0], height=size[1], params=params.tolist())
    if not camera.verify_params() or not np.isfinite(params).all():
        wanted = camera.params_info or "none"
        raise InputError(f"{where}: the parameters of {model} must be {wanted}, finite numbers, not {params.tolist()}")
    if min(size) < 1 or camera.mean_focal_length() <= 0:
        raise InputError(f"{where}: size {size[0]}×{size[1]} and focal length must be positive")
    return Camera(model=model, width_px=size[0], height_px=size[1], params=params, focal_is_known=True, is_given=True)


def rescaled(camera: Camera, width_px: int, height_px: int) -> Camera:
    """The same camera for photos of another size."""
    changed = pycolmap.Camera(
        model=camera.model, width=camera.width_px, height=camera.height_px, params=camera.params.tolist()
    )
    changed.rescale(width_px, height_px)
    return Camera(
        model=camera.model,
        width_px=width_px,
        height_px=height_px,
        params=np.array(changed.params),
        focal_is_known=True,
        is_given=True,
    )


def model_cameras(model: ColmapModel, where: str) -> dict[str, Camera]:
    """The given camera of every registered image, by name."""
    return {
        name: make_camera(camera.model, (camera.width_px, camera.height_px), camera.params, f"{where}: {name}")
        for name, camera in model.cameras.items()
    }


def model_poses(model: ColmapModel) -> dict[str, Float64]:
    """cam_from_world of every registered image by name, as [7]: the quaternion x, y, z, w and the translation."""
    reconstruction = model.reconstruction
    images = [reconstruction.image(number) for number in reconstruction.reg_image_ids()]
    return {image.name: np.array(image.cam_from_world().params) for image in images}


def pose_params(cam_from_world: Float64) -> Float64:
    """A pose [3, 4] as [7]: the quaternion x, y, z, w and the translation."""
    rotation = pycolmap.Rotation3d(cam_from_world[:, :3])
    return np.array(pycolmap.Rigid3d(rotation, cam_from_world[:, 3]).params)


def read_cameras(path: Path) -> tuple[Camera, ...]:
    """The cameras of a cameras.txt or cameras.bin.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    try:
        cameras = _read_text(path) if path.suffix.lower() == ".txt" else _read_binary(path)
    except OSError as error:
        raise InputError(f"cannot read the cameras {path}: {error.strerror}") from error
    except (ValueError, IndexError, struct.error) as error:
        raise InputError(f"{path} holds no cameras of COLMAP's: {error}") from error
    if not cameras:
        raise InputError(f"{path} holds no camera")
    return tuple(cameras)


def _read_text(path: Path) -> list[Camera]:
    cameras = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        params = np.array([float(word) for word in words[4:]])
        cameras.append(make_camera(words[1], (int(words[2]), int(words[3])), params, f"{path}, line {number}"))
    return cameras


def _read_binary(path: Path) -> list[Camera]:
    data = path.read_bytes()
    (count,) = struct.unpack_from("<Q", data)
    if count > _MAX_CAMERAS:
        raise ValueError(f"it announces {count} cameras")
    cameras, at = [], 8
    for number in range(count):
        _, model, width, height = struct.unpack_from("<IiQQ", data, at)
        name = pycolmap.CameraModelId(model).name
        length = len(pycolmap.Camera.create_from_model_name(1, name, 1.0, 1, 1).params)
        params = np.array(struct.unpack_from(f"<{length}d", data, at + 24))
        at += 24 + 8 * length
        cameras.append(make_camera(name, (width, height), params, f"{path}, camera {number + 1}"))
    return cameras
