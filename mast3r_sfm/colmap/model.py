"""COLMAP models: reading, writing and summing up."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pycolmap
import scipy.sparse
from scipy.sparse.csgraph import connected_components

from mast3r_sfm.config import ModelFormat
from mast3r_sfm.errors import InputError
from mast3r_sfm.geometry.similarity import Similarity
from mast3r_sfm.summaries import ModelSummary
from mast3r_sfm.types import Bool, Camera, Float64, Int64, Tracks

_NO_ROWS: Int64 = np.zeros(0, np.int64)
SPACES_IN_TEXT = "names of photos have spaces, which COLMAP does not understand in text models; write binary ones"


class ColmapModel:
    """A reconstruction in COLMAP's terms: cameras, registered images and points with tracks."""

    def __init__(self, reconstruction: pycolmap.Reconstruction, tracks: Tracks | None = None) -> None:
        """Wrap a reconstruction of pycolmap.

        Args:
            reconstruction: it belongs to the model from now on.
            tracks: those of the reconstruction, as the model would give them, where they are known: to read them takes
                as long as a step of bundle adjustment.
        """
        self._reconstruction = reconstruction
        if tracks is not None:
            self._tracks = tracks

    @property
    def reconstruction(self) -> pycolmap.Reconstruction:
        """What is wrapped; for this package alone."""
        return self._reconstruction

    @property
    def cam_from_world(self) -> dict[str, Float64]:
        """cam_from_world [3, 4] of every registered image, by name, sorted."""
        return {image.name: image.cam_from_world().matrix() for image in self._registered()}

    def names(self) -> dict[int, str]:
        """Name of every registered image, by its number."""
        return {image.image_id - 1: image.name for image in self._registered()}

    def poses(self) -> dict[int, Float64]:
        """cam_from_world [3, 4] of every registered image, by its number."""
        return {image.image_id - 1: image.cam_from_world().matrix() for image in self._registered()}

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

    def observations_of_images(self) -> dict[int, int]:
        """How many points every registered image observes, by its number."""
        return {image.image_id - 1: image.num_points3D for image in self._registered()}

    def keypoints(self) -> dict[int, Float64]:
        """[K, 2] photo pixels of all keypoints of every registered image, by its number."""
        return {
            image.image_id - 1: np.array([(keypoint.x(), keypoint.y()) for keypoint in image.points2D]).reshape(-1, 2)
            for image in self._registered()
        }

    def tracks(self) -> Tracks:
        """All points with their observations; image n is that of the id n + 1, as the database numbers them."""
        return self._tracks

    @cached_property
    def _tracks(self) -> Tracks:
        numbers, points = self._points()
        point, image, keypoint, xy = [_NO_ROWS], [_NO_ROWS], [_NO_ROWS], [np.zeros((0, 2))]
        for number in sorted(self._reconstruction.reg_image_ids()):
            one = self._reconstruction.image(number)
            # Of pycolmap's lists of observations, those of images are read ten times as fast as those of points.
            seen = list(one.get_observation_points2D())
            point.append(np.searchsorted(numbers, np.array([each.point3D_id for each in seen], np.int64)))
            image.append(np.full(len(seen), number - 1))
            keypoint.append(np.array(one.get_observation_point2D_idxs(), np.int64))
            xy.append(np.array([[each.x() for each in seen], [each.y() for each in seen]]).T)
        rows, images, keypoints = (np.concatenate(column) for column in (point, image, keypoint))
        return _in_order(Tracks(points=points, point=rows, image=images, keypoint=keypoints, xy=np.concatenate(xy)))

    def _points(self) -> tuple[Int64, Float64]:
        """Numbers [K] of all points, ascending, and where they are [K, 3]."""
        found = dict(self._reconstruction.points3D.items())
        numbers = sorted(found)
        return np.array(numbers, np.int64), np.array([found[number].xyz for number in numbers]).reshape(-1, 3)

    def project(self, image: int, points: Float64) -> Float64:
        """World points [M, 3] to photo pixels [M, 2] of image number `image`; NaN behind the camera."""
        pose = self._reconstruction.image(image + 1).cam_from_world().matrix()
        camera = self._reconstruction.camera(self._reconstruction.image(image + 1).camera_id)
        local = points @ pose[:, :3].T + pose[:, 3]
        return np.asarray(camera.img_from_cam(local), np.float64).reshape(-1, 2)

    def viewing_rays(self, image: int, xy: Float64) -> tuple[Float64, Float64]:
        """The camera's centre [3] and the unit directions [M, 3] of photo pixels, in the world."""
        pose = self._reconstruction.image(image + 1).cam_from_world().matrix()
        camera = self._reconstruction.camera(self._reconstruction.image(image + 1).camera_id)
        normalised = np.asarray(camera.cam_from_img(xy), np.float64).reshape(-1, 2)
        rays = np.concatenate([normalised, np.ones((len(normalised), 1))], axis=1) @ pose[:, :3]
        return -pose[:, :3].T @ pose[:, 3], rays / np.linalg.norm(rays, axis=1, keepdims=True)

    def size(self, image: int) -> tuple[int, int]:
        """Width and height of image number `image` in photo pixels."""
        camera = self._reconstruction.camera(self._reconstruction.image(image + 1).camera_id)
        return camera.width, camera.height

    def groups(self, min_shared: int, min_views: int = 2) -> list[list[int]]:
        """Numbers of the registered images, in groups that chains of images with so many common points hold together.

        Largest first; between groups, next to nothing says how they stand to each other.

        Args:
            min_shared: points that two images must share.
            min_views: images that see such a point at least.
        """
        tracks = self.tracks()
        counts = np.bincount(tracks.point, minlength=len(tracks.points)) >= min_views
        images = np.array(sorted(number - 1 for number in self._reconstruction.reg_image_ids()), np.int64)
        sees = scipy.sparse.csr_array(
            (counts[tracks.point].astype(np.float64), (tracks.point, np.searchsorted(images, tracks.image))),
            shape=(len(tracks.points), len(images)),
        )
        shared = ((sees.T @ sees) >= min_shared).astype(np.int64)
        _, label = connected_components(shared, directed=False)
        groups = [images[label == number].tolist() for number in range(label.max(initial=-1) + 1)]
        return sorted(groups, key=lambda group: (-len(group), group))

    def lost(self, before: ColmapModel) -> Tracks:
        """The points, in the order of `tracks`, with the observations that they had before and do not have now.

        Args:
            before: the model that this one was made from.
        """
        earlier, numbers = before.tracks(), sorted(self._reconstruction.point3D_ids())
        earlier_numbers = np.array(sorted(before.reconstruction.point3D_ids()), np.int64)
        row_of = {number: row for row, number in enumerate(numbers)}
        row = np.array([row_of.get(number, -1) for number in earlier_numbers.tolist()], np.int64)[earlier.point]
        gone = row >= 0
        for image in np.unique(earlier.image).tolist():
            mine = np.flatnonzero(earlier.image == image)
            keypoints = self._reconstruction.image(image + 1).points2D
            gone[mine] &= [not keypoints[keypoint].has_point3D() for keypoint in earlier.keypoint[mine].tolist()]
        return Tracks(
            points=np.array([self._reconstruction.point3D(number).xyz for number in numbers]).reshape(-1, 3),
            point=row[gone],
            image=earlier.image[gone],
            keypoint=earlier.keypoint[gone],
            xy=earlier.xy[gone],
        )

    def extended(self, more: Tracks) -> ColmapModel:
        """A copy in which the points, in the order of `tracks`, have further observations.

        Each is a new keypoint, or a keypoint without a point, which moves there.
        """
        changed = pycolmap.Reconstruction(self._reconstruction)
        numbers = np.array(sorted(self._reconstruction.point3D_ids()), np.int64)[more.point].tolist()
        number_of = more.keypoint.copy()
        for image in np.unique(more.image).tolist():
            keypoints = changed.image(image + 1).points2D
            for row in np.flatnonzero(more.image == image).tolist():
                if number_of[row] < 0:
                    number_of[row] = len(keypoints)
                    keypoints.append(pycolmap.Point2D(more.xy[row]))
                else:
                    keypoints[int(number_of[row])].xy = more.xy[row]
                changed.add_observation(numbers[row], pycolmap.TrackElement(image + 1, int(number_of[row])))
        return ColmapModel(changed, _in_order(self.tracks().joined(replace(more, keypoint=number_of))))

    def moved(self, tracks: Tracks, xy: Float64, kept: Bool) -> ColmapModel:
        """A copy whose observations `tracks`, all that there are, stand at `xy` [O, 2], without those that are not
        `kept` [O]."""
        changed = pycolmap.Reconstruction(self._reconstruction)
        for image in np.unique(tracks.image).tolist():
            keypoints = changed.image(image + 1).points2D
            mine = np.flatnonzero(kept & (tracks.image == image))
            for keypoint, place in zip(tracks.keypoint[mine].tolist(), xy[mine], strict=True):
                keypoints[keypoint].xy = place
        # A point that keeps a single observation goes, and its observations with it.
        stays = np.bincount(tracks.point[kept], minlength=len(tracks.points)) > 1
        numbers = np.array(sorted(self._reconstruction.point3D_ids()), np.int64)
        for number in numbers[~stays].tolist():
            changed.delete_point3D(number)
        for row in np.flatnonzero(~kept & stays[tracks.point]).tolist():
            changed.delete_observation(int(tracks.image[row]) + 1, int(tracks.keypoint[row]))
        rows = kept & stays[tracks.point]
        left = Tracks(
            points=tracks.points[stays],
            point=(np.cumsum(stays) - 1)[tracks.point[rows]],
            image=tracks.image[rows],
            keypoint=tracks.keypoint[rows],
            xy=xy[rows],
        )
        return ColmapModel(changed, _in_order(left))

    def restricted_to(self, images: Iterable[int]) -> ColmapModel:
        """A copy with only these of its images, by number, and the points that two of them still see."""
        changed = pycolmap.Reconstruction(self._reconstruction)
        kept = {image + 1 for image in images}
        for number in sorted(set(changed.reg_image_ids()) - kept):
            changed.deregister_frame(changed.image(number).frame_id)
        return ColmapModel(changed)

    def transformed(self, similarity: Similarity) -> ColmapModel:
        """A copy in another world, to which the similarity leads from this one."""
        changed = pycolmap.Reconstruction(self._reconstruction)
        rotation = pycolmap.Rotation3d(similarity.rotation)
        changed.transform(pycolmap.Sim3d(similarity.scale, rotation, similarity.translation))
        return ColmapModel(changed)

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

    def write(self, folder: Path, file_format: ModelFormat = "binary") -> None:
        """Write cameras, images, points3D, and rigs and frames where the format has them; replaces what stood there."""
        unfinished = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        if file_format == "text":
            self._reconstruction.write_text(str(unfinished))
        else:
            self._reconstruction.write_binary(str(unfinished))
        if file_format == "colmap-3.8":
            # The other three files have not changed since then.
            for name in ("rigs.bin", "frames.bin"):
                (unfinished / name).unlink()
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)

    def write_ply(self, path: Path) -> None:
        """Write the coloured points as a PLY file."""
        self._reconstruction.export_PLY(str(path))


def _in_order(tracks: Tracks) -> Tracks:
    """The same with observations sorted by point, image and keypoint."""
    order = np.lexsort((tracks.keypoint, tracks.image, tracks.point))
    return Tracks(
        points=tracks.points,
        point=tracks.point[order],
        image=tracks.image[order],
        keypoint=tracks.keypoint[order],
        xy=tracks.xy[order],
    )


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


def write_models(
    models: Sequence[ColmapModel], sparse: Path, file_format: ModelFormat = "binary"
) -> list[ModelSummary]:
    """Write models as sparse/0, sparse/1, …, and remove models of an earlier run that stand there beyond them."""
    for number, model in enumerate(models):
        model.write(sparse / str(number), file_format)
    for folder in sparse.iterdir() if sparse.is_dir() else ():
        if folder.is_dir() and folder.name.isdigit() and int(folder.name) >= len(models):
            shutil.rmtree(folder)
    return [model.summary(f"{sparse.name}/{number}") for number, model in enumerate(models)]
