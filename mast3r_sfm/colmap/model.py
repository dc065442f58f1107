"""COLMAP models: reading, writing and summing up."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pycolmap

from mast3r_sfm.errors import InputError
from mast3r_sfm.types import Camera, Float64, ModelSummary


class ColmapModel:
    """A reconstruction in COLMAP's terms: cameras, registered images and points with tracks."""

    def __init__(self, reconstruction: pycolmap.Reconstruction) -> None:
        """Wrap a reconstruction of pycolmap."""
        self._reconstruction = reconstruction

    @property
    def cam_from_world(self) -> dict[str, Float64]:
        """cam_from_world [3, 4] of every registered image, by name, sorted."""
        return {image.name: image.cam_from_world().matrix() for image in self._registered()}

    @property
    def cameras(self) -> dict[str, Camera]:
        """Intrinsics of every registered image, by name."""
        return {image.name: _camera(self._reconstruction.camera(image.camera_id)) for image in self._registered()}

    @property
    def num_points(self) -> int:
        """Number of 3D points."""
        return int(self._reconstruction.num_points3D())

    @property
    def observed_share(self) -> float:
        """Share of the registered images' keypoints that have a 3D point."""
        keypoints = sum(image.num_points2D() for image in self._registered())
        return float(self._reconstruction.compute_num_observations()) / max(keypoints, 1)

    def _registered(self) -> list[pycolmap.Image]:
        images = [self._reconstruction.image(number) for number in self._reconstruction.reg_image_ids()]
        return sorted(images, key=lambda image: image.name)

    def summary(self, path: str) -> ModelSummary:
        """Counts and means, for reports.

        Args:
            path: where the model stands, relative to the output folder.
        """
        return ModelSummary(
            path=path,
            images=tuple(self.cam_from_world),
            points=self.num_points,
            observations=int(self._reconstruction.compute_num_observations()),
            mean_track_length=float(self._reconstruction.compute_mean_track_length()),
            mean_reprojection_error_px=float(self._reconstruction.compute_mean_reprojection_error()),
        )

    def colour(self, images: Path) -> None:
        """Give every point the mean colour of its observations in the photos under `images`."""
        self._reconstruction.extract_colors_for_all_images(str(images))

    def write(self, folder: Path) -> None:
        """Write cameras, images, points3D, rigs and frames in COLMAP's binary format; replaces what stood there."""
        unfinished = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        self._reconstruction.write_binary(str(unfinished))
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)

    def write_ply(self, path: Path) -> None:
        """Write the coloured points as a PLY file."""
        self._reconstruction.export_PLY(str(path))


def _camera(camera: pycolmap.Camera) -> Camera:
    return Camera(
        model=camera.model.name,
        width_px=camera.width,
        height_px=camera.height,
        params=np.array(camera.params),
        focal_is_known=camera.has_prior_focal_length,
    )


def read_model(folder: Path) -> ColmapModel:
    """Read a COLMAP model, binary or text.

    Raises:
        InputError: there is no model in this folder, or it is broken.
    """
    if not any((folder / f"images.{ending}").is_file() for ending in ("bin", "txt")):
        raise InputError(f"{folder} holds no COLMAP model: images.bin or images.txt is missing")
    for name, smallest in _SMALLEST_ENTRY.items():
        if (path := folder / f"{name}.bin").is_file():
            _check_count(path, smallest)
    try:
        return ColmapModel(pycolmap.Reconstruction(str(folder)))
    except (RuntimeError, ValueError, IndexError, MemoryError) as error:
        raise InputError(f"the COLMAP model in {folder} cannot be read: {error}") from error


# Bytes of the smallest entry in COLMAP's binary format: three parameters, no name, no observations, an empty track.
_SMALLEST_ENTRY = {"cameras": 4 + 4 + 8 + 8 + 3 * 8, "images": 4 + 7 * 8 + 4 + 1 + 8, "points3D": 8 + 3 * 8 + 3 + 8 + 8}


def _check_count(path: Path, smallest: int) -> None:
    """Refuse a file that is too short for the entries that it announces: pycolmap would take the count's word."""
    with path.open("rb") as file:
        data = file.read(8)
    count = int.from_bytes(data, "little")
    if len(data) < 8 or path.stat().st_size < 8 + count * smallest:
        raise InputError(f"the COLMAP model in {path.parent} is broken: {path.name} is cut off or no such file")


def write_models(models: Sequence[ColmapModel], sparse: Path) -> list[ModelSummary]:
    """Write models as sparse/0, sparse/1, …, and remove models of an earlier run that stand there beyond them."""
    for number, model in enumerate(models):
        model.write(sparse / str(number))
    for folder in sparse.iterdir() if sparse.is_dir() else ():
        if folder.is_dir() and folder.name.isdigit() and int(folder.name) >= len(models):
            shutil.rmtree(folder)
    return [model.summary(f"{sparse.name}/{number}") for number, model in enumerate(models)]
