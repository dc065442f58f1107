"""COLMAP's database.db: cameras, images, keypoints, matches and two-view geometries."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycolmap
from numpy.typing import NDArray

from mast3r_sfm.errors import ArtifactError
from mast3r_sfm.types import Camera, Float64, PairMatches, Rig, Verdict

_CONFIGURATION = {
    Verdict.GOOD: pycolmap.TwoViewGeometryConfiguration.CALIBRATED,
    Verdict.PLANAR: pycolmap.TwoViewGeometryConfiguration.PLANAR,
    Verdict.PURE_ROTATION: pycolmap.TwoViewGeometryConfiguration.PANORAMIC,
}


@dataclass(frozen=True, kw_only=True)
class DatabaseContent:
    """What goes into a database; image i gets the id i + 1, camera c the id c + 1."""

    names: Sequence[str]
    rig: Rig
    camera_model: str
    keypoints: Sequence[Float64]
    """Per image [K, 2] photo pixels."""
    matches: Sequence[PairMatches]
    """Verified pairs."""
    indices: Mapping[tuple[int, int], NDArray[np.uint32]]
    """[M, 2] keypoint indices of each verified pair."""


def write_database(path: Path, content: DatabaseContent) -> None:
    """Write a new database in place of `path`.

    Raises:
        ArtifactError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        database = pycolmap.Database.open(str(temporary))
        try:
            with pycolmap.DatabaseTransaction(database):
                _write_images(database, content)
                _write_pairs(database, content)
        finally:
            database.close()
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {path}: {error}; free the space or choose another folder") from error


def update_keypoints(path: Path, keypoints: Mapping[int, Float64]) -> None:
    """Replace the keypoints of images, by number [K, 2]: those that are there may move, more may follow; matches stay.

    Raises:
        ArtifactError: it cannot be written.
    """
    try:
        with pycolmap.Database.open(str(path)) as database, pycolmap.DatabaseTransaction(database):
            for image, xy in sorted(keypoints.items()):
                database.update_keypoints(image + 1, np.asarray(xy, np.float32))
    except RuntimeError as error:
        raise ArtifactError(f"cannot write {path}: {error}; free the space or choose another folder") from error


def colmap_camera(camera: Camera, model: str, number: int) -> pycolmap.Camera:
    """A pinhole camera as a `model` of COLMAP, without distortion; one that was given as it is."""
    if camera.is_given:
        given = pycolmap.Camera(
            camera_id=number,
            model=camera.model,
            width=camera.width_px,
            height=camera.height_px,
            params=camera.params.tolist(),
        )
        given.has_prior_focal_length = True
        return given
    focal, x, y = camera.params[:3].tolist()
    result = pycolmap.Camera.create_from_model_name(number, model, focal, camera.width_px, camera.height_px)
    result.principal_point_x, result.principal_point_y = x, y
    result.has_prior_focal_length = camera.focal_is_known
    return result


def _write_images(database: pycolmap.Database, content: DatabaseContent) -> None:
    for number, camera in enumerate(content.rig.cameras, start=1):
        database.write_camera(colmap_camera(camera, content.camera_model, number), use_camera_id=True)
        rig = pycolmap.Rig(rig_id=number)
        rig.add_ref_sensor(pycolmap.sensor_t(type=pycolmap.SensorType.CAMERA, id=number))
        database.write_rig(rig, use_rig_id=True)
    for number, name in enumerate(content.names, start=1):
        camera_id = int(content.rig.camera_of_image[number - 1]) + 1
        image = pycolmap.Image(name=name, camera_id=camera_id, image_id=number)
        database.write_image(image, use_image_id=True)
        frame = pycolmap.Frame(frame_id=number, rig_id=camera_id)
        frame.add_data_id(image.data_id)
        database.write_frame(frame, use_frame_id=True)
        database.write_keypoints(number, np.asarray(content.keypoints[number - 1], np.float32))


def _write_pairs(database: pycolmap.Database, content: DatabaseContent) -> None:
    for match in content.matches:
        indices = content.indices[match.first, match.second]
        pose = match.second_from_first
        geometry = pycolmap.TwoViewGeometry(
            config=_CONFIGURATION[match.verdict],
            inlier_matches=indices,
            cam2_from_cam1=pycolmap.Rigid3d(pycolmap.Rotation3d(pose[:, :3]), pose[:, 3]),
        )
        database.write_matches(match.first + 1, match.second + 1, indices)
        database.write_two_view_geometry(match.first + 1, match.second + 1, geometry)
