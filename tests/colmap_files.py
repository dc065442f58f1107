"""COLMAP's binary model files as COLMAP 3.8 documents them ("Output Format"), read with struct alone.

All numbers are little-endian. A file begins with the number of its entries (uint64).

- cameras.bin: camera id (uint32), model id (int32), width, height (uint64), parameters (double, as many as the model
  has).
- images.bin: image id (uint32), quaternion w x y z and translation of cam_from_world (7 double), camera id (uint32),
  name (bytes up to a zero), number of keypoints (uint64), of each x, y (double) and the id of its point (uint64; all
  bits set, read as -1: none).
- points3D.bin: point id (uint64), x y z (double), red green blue (uint8), error (double), track length (uint64), of
  each element image id and number of the keypoint (uint32).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MODELS = {
    0: ("SIMPLE_PINHOLE", 3),
    1: ("PINHOLE", 4),
    2: ("SIMPLE_RADIAL", 4),
    3: ("RADIAL", 5),
    4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8),
    6: ("FULL_OPENCV", 12),
    7: ("FOV", 5),
    8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5),
    10: ("THIN_PRISM_FISHEYE", 12),
}
"""COLMAP 3.8's camera models and the number of their parameters."""


@dataclass(frozen=True, kw_only=True)
class StoredCamera:
    model: str
    width: int
    height: int
    params: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    name: str
    camera: int
    quaternion: NDArray[np.float64]
    """w x y z."""
    translation: NDArray[np.float64]
    xy: NDArray[np.float64]
    points: NDArray[np.int64]

    @property
    def rotation(self) -> NDArray[np.float64]:
        w, x, y, z = self.quaternion
        return np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
            ]
        )

    def local(self, xyz: NDArray[np.float64]) -> NDArray[np.float64]:
        return xyz @ self.rotation.T + self.translation


@dataclass(frozen=True, kw_only=True)
class StoredPoint:
    xyz: NDArray[np.float64]
    rgb: tuple[int, int, int]
    error: float
    track: tuple[tuple[int, int], ...]
    """Image and keypoint."""


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    cameras: dict[int, StoredCamera]
    images: dict[int, StoredImage]
    points: dict[int, StoredPoint]


class _File:
    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self._at = 0

    def take(self, form: str) -> tuple[int | float, ...]:
        found = struct.unpack_from("<" + form, self._data, self._at)
        self._at += struct.calcsize("<" + form)
        return found

    def text(self) -> str:
        end = self._data.index(b"\0", self._at)
        found = self._data[self._at : end].decode("utf-8")
        self._at = end + 1
        return found

    def end(self) -> None:
        assert self._at == len(self._data), f"{len(self._data) - self._at} bytes are left"


def read_stored(folder: Path) -> StoredModel:
    return StoredModel(
        cameras=_cameras(_File(folder / "cameras.bin")),
        images=_images(_File(folder / "images.bin")),
        points=_points(_File(folder / "points3D.bin")),
    )


def _cameras(file: _File) -> dict[int, StoredCamera]:
    found = {}
    for _ in range(int(file.take("Q")[0])):
        number, model, width, height = map(int, file.take("IiQQ"))
        name, count = MODELS[model]
        found[number] = StoredCamera(model=name, width=width, height=height, params=file.take(f"{count}d"))
    file.end()
    return found


def _images(file: _File) -> dict[int, StoredImage]:
    found = {}
    for _ in range(int(file.take("Q")[0])):
        number, *pose, camera = file.take("I7dI")
        name, count = file.text(), int(file.take("Q")[0])
        keypoints = np.array(file.take("ddq" * count), np.float64).reshape(count, 3)
        found[int(number)] = StoredImage(
            name=name,
            camera=int(camera),
            quaternion=np.array(pose[:4]),
            translation=np.array(pose[4:]),
            xy=keypoints[:, :2],
            points=keypoints[:, 2].astype(np.int64),
        )
    file.end()
    return found


def _points(file: _File) -> dict[int, StoredPoint]:
    found = {}
    for _ in range(int(file.take("Q")[0])):
        number, x, y, z, red, green, blue, error, length = file.take("Q3d3BdQ")
        track = file.take("II" * int(length))
        found[int(number)] = StoredPoint(
            xyz=np.array([x, y, z]),
            rgb=(int(red), int(green), int(blue)),
            error=float(error),
            track=tuple((int(i), int(k)) for i, k in zip(track[::2], track[1::2], strict=True)),
        )
    file.end()
    return found
