"""Files that tell cameras and poses: gt.json, nerfstudio's transforms.json, COLMAP models and their list of cameras."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mast3r_sfm.colmap.cameras import make_camera, model_cameras, model_poses, pose_params, read_cameras
from mast3r_sfm.colmap.model import read_model
from mast3r_sfm.errors import InputError
from mast3r_sfm.evaluation.truth import load_object, read_numbers, read_rotation
from mast3r_sfm.types import Camera, Float64

_NERFSTUDIO = {"OPENCV": ("k1", "k2", "p1", "p2"), "OPENCV_FISHEYE": ("k1", "k2", "k3", "k4")}
_FORMS = (
    "give a gt.json, a transforms.json, a folder with a COLMAP model, or its cameras.txt or cameras.bin; for poses, a "
    "gt.json or a COLMAP model"
)


@dataclass(frozen=True, kw_only=True)
class KnownFile:
    """What a file tells, by the names of images as they stand in it."""

    path: Path
    cameras: Mapping[str, Camera] = field(default_factory=dict)
    unnamed: tuple[Camera, ...] = ()
    """Cameras of a file that names no images."""
    poses: Mapping[str, Float64] = field(default_factory=dict)
    """cam_from_world [7]: quaternion x, y, z, w and translation."""
    scene: Mapping[str, str] = field(default_factory=dict)
    """Of each pose; those of different scenes have different frames."""


def read_known_file(path: Path) -> KnownFile:
    """Read cameras and poses, in whichever form the file has.

    Raises:
        InputError: the file cannot be read, or has none of the known forms.
    """
    if path.is_dir():
        if (path / "sparse" / "0").is_dir():
            path = path / "sparse" / "0"  # the output of a run stands for its largest model
        model = read_model(path)
        return KnownFile(path=path, cameras=model_cameras(model, str(path)), poses=model_poses(model))
    if not path.exists():
        raise InputError(f"there is no file {path}: {_FORMS}")
    if path.suffix.lower() in (".txt", ".bin"):
        if path.stem.lower() != "cameras":
            raise InputError(f"{path} is not a list of cameras: {_FORMS}")
        return KnownFile(path=path, unnamed=read_cameras(path))
    if path.suffix.lower() != ".json":
        raise InputError(f"{path} has no form that tells cameras or poses: {_FORMS}")
    data = load_object(path)
    if isinstance(data.get("images"), dict):
        return _read_truth(path, data["images"])
    if "frames" in data or "fl_x" in data:
        return _read_nerfstudio(path, data)
    raise InputError(f'{path} has neither "images" nor "frames": {_FORMS}')


def _read_truth(path: Path, images: Mapping[str, Any]) -> KnownFile:
    cameras, poses, scene = {}, {}, {}
    for name, entry in images.items():
        where = f"{path}: images[{name!r}]"
        if not isinstance(entry, dict):
            raise InputError(f"{where} must be an object")
        if entry.get("K") is not None:
            cameras[name] = _truth_camera(entry, where)
        if entry.get("R") is not None or entry.get("t") is not None:
            rotation = read_rotation(entry.get("R"), f"{where}.R")
            translation = read_numbers(entry.get("t"), (3,), f"{where}.t")
            poses[name] = pose_params(np.column_stack([rotation, translation]))
            scene[name] = str(entry.get("scene", ""))
    return KnownFile(path=path, cameras=cameras, poses=poses, scene=scene)


def _truth_camera(entry: Mapping[str, Any], where: str) -> Camera:
    matrix = read_numbers(entry["K"], (3, 3), f"{where}.K")
    pinhole = np.array([[matrix[0, 0], 0.0, matrix[0, 2]], [0.0, matrix[1, 1], matrix[1, 2]], [0.0, 0.0, 1.0]])
    if not np.allclose(matrix, pinhole, rtol=0, atol=1e-6 * max(abs(matrix[0, 0]), 1.0)):
        raise InputError(f"{where}.K must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]: COLMAP knows no skew")
    # There, the centre of the first pixel is at (0, 0).
    params = np.array([matrix[0, 0], matrix[1, 1], matrix[0, 2] + 0.5, matrix[1, 2] + 0.5])
    size = _size(entry, ("width", "height"), where)
    if entry.get("dist") is None:
        return make_camera("PINHOLE", size, params, where)
    distortion = read_numbers(entry["dist"], (4,), f"{where}.dist")
    return make_camera("OPENCV", size, np.concatenate([params, distortion]), where)


def _read_nerfstudio(path: Path, data: Mapping[str, Any]) -> KnownFile:
    """Intrinsics stand beside the frames or in them; their pixels are COLMAP's."""
    frames = data.get("frames", [])
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise InputError(f'{path}: "frames" must be a list of objects')
    cameras = {}
    for number, frame in enumerate(frames):
        where = f"{path}: frames[{number}]"
        name = frame.get("file_path")
        if not isinstance(name, str) or not name:
            raise InputError(f"{where}.file_path is missing")
        cameras[name.removeprefix("./")] = _nerfstudio_camera({**data, **frame}, where)
    if cameras:
        return KnownFile(path=path, cameras=cameras)
    return KnownFile(path=path, unnamed=(_nerfstudio_camera(data, str(path)),))


def _nerfstudio_camera(values: Mapping[str, Any], where: str) -> Camera:
    model = values.get("camera_model", "OPENCV")
    if model == "PINHOLE":
        model = "OPENCV"  # distortion, where it is stated, holds all the same
    if model not in _NERFSTUDIO:
        raise InputError(f"{where}: camera_model {model!r} is none of {', '.join(_NERFSTUDIO)}")
    names = ("fl_x", "fl_y", "cx", "cy")
    known = {**values, "fl_y": values.get("fl_y", values.get("fl_x"))}
    params = [float(read_numbers(known.get(name), (), f"{where}.{name}")) for name in names]
    distortion = [float(read_numbers(known.get(name, 0.0), (), f"{where}.{name}")) for name in _NERFSTUDIO[model]]
    size = _size(values, ("w", "h"), where)
    if model == "OPENCV" and not any(distortion):
        return make_camera("PINHOLE", size, np.array(params), where)
    return make_camera(model, size, np.array(params + distortion), where)


def _size(values: Mapping[str, Any], names: tuple[str, str], where: str) -> tuple[int, int]:
    found = [values.get(name) for name in names]
    sides = [value for value in found if isinstance(value, int | float) and value == round(value) and value > 0]
    if len(sides) < len(names):
        raise InputError(f"{where} must hold {names[0]} and {names[1]} in whole pixels, not {found}")
    return round(sides[0]), round(sides[1])
