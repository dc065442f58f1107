"""What is known of the photos beforehand: whose cameras and poses stand in the files that the user named."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from mast3r_sfm.colmap.cameras import rescaled
from mast3r_sfm.config import KnownConfig, fingerprint
from mast3r_sfm.errors import InputError, some_of
from mast3r_sfm.geometry.known_poses import KnownPoses
from mast3r_sfm.known_files import KnownFile, read_known_file
from mast3r_sfm.progress import Progress
from mast3r_sfm.types import Camera, ImageRecord, ImageSet, LeftOut

_MAX_ASPECT_PX = 1.0
"""Pixels by which a photo may be higher than its width and the camera's shape make it: sizes are whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """The known cameras and poses of the photos of a run."""

    photos: ImageSet
    """Those that take part; photos of one known camera are one group."""
    cameras: Mapping[str, Camera] = field(default_factory=dict)
    """By group, of those groups whose camera is known."""
    poses: KnownPoses | None = None
    source: str = ""
    """Path of the poses, for people."""

    @property
    def cameras_key(self) -> tuple[object, ...]:
        """What there is to say of the cameras in a cache key: their content, wherever it stood; empty without any."""
        if not self.cameras:
            return ()
        # Whether they are refined later changes no match.
        plain = {group: _plain(replace(camera, is_fixed=False)) for group, camera in self.cameras.items()}
        return tuple(plain.get(record.camera_group) for record in self.photos.records)

    @property
    def poses_key(self) -> tuple[object, ...]:
        """The same of the poses."""
        if self.poses is None:
            return ()
        return self.poses.is_fixed, self.poses.images.tolist(), self.poses.params.tolist()

    def describe(self, registered: Sequence[str]) -> str:
        """One line on who has joined the photos of known poses; empty without these.

        Args:
            registered: names of the photos of the model in the frame of the known poses, sorted.
        """
        if self.poses is None:
            return ""
        posed = {self.photos.names[image] for image in self.poses.images}
        held, added = [name for name in registered if name in posed], [n for n in registered if n not in posed]
        manner = "fixed" if self.poses.is_fixed else "refined"
        more = f"; {len(added)} more placed in their frame: {some_of(added)}" if added else ""
        return f"{len(held)} of {len(posed)} photos with a known pose are in the model ({manner}){more}"


def resolve_known(config: KnownConfig, photos: ImageSet, progress: Progress) -> Known:
    """Read the files of known cameras and poses, and find their photos.

    Args:
        config: names the files.
        photos: as they were listed.
        progress: told what the files leave open, and of cameras that were scaled to the photos.

    Raises:
        InputError: a file cannot be read, names none of the photos, or does not fit them.
    """
    known = Known(photos=photos)
    if config.poses:
        known = _with_poses(known, config, read_known_file(Path(config.poses)), progress)
    if config.intrinsics:
        known = _with_cameras(known, config, read_known_file(Path(config.intrinsics)), progress)
    return known


def match_names(wanted: Iterable[str], photos: Collection[str]) -> dict[str, str]:
    """The photo that each name of a file means, of those that mean one.

    A name is that of the photo; or ends in it, as images/a.jpg does in a.jpg; or has the last part in common with one
    photo alone.
    """
    names, left = {}, set(photos)
    pending = []
    for name in wanted:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        endings = ["/".join(parts[start:]) for start in range(len(parts))]
        found = next((ending for ending in endings if ending in left), None)
        if found is None:
            pending.append(name)
        else:
            names[name] = found
            left.remove(found)
    by_last: dict[str, list[str]] = {}
    for photo in sorted(left):
        by_last.setdefault(PurePosixPath(photo).name, []).append(photo)
    asked: dict[str, list[str]] = {}
    for name in pending:
        asked.setdefault(PurePosixPath(name.replace("\\", "/")).name, []).append(name)
    for last, who in asked.items():
        if len(who) == 1 and len(by_last.get(last, ())) == 1:
            names[who[0]] = by_last[last][0]
    return names


def _with_poses(known: Known, config: KnownConfig, file: KnownFile, progress: Progress) -> Known:
    if not file.poses:
        raise InputError(f"{file.path} tells no pose; --poses takes a gt.json or a COLMAP model")
    photo_of = _find_photos(file.path, file.poses, known.photos, "pose", progress)
    scenes = sorted({file.scene.get(name, "") for name in photo_of})
    if len(scenes) > 1:
        raise InputError(
            f"{file.path}: the photos' poses belong to {len(scenes)} scenes ({some_of(scenes)}), which have no frame "
            "in common; reconstruct one scene at a time"
        )
    photos = known.photos
    if config.only_posed:
        photos = _restricted(photos, set(photo_of.values()), file.path)
    number = {name: image for image, name in enumerate(photos.names)}
    rows = sorted((number[photo], name) for name, photo in photo_of.items())
    params = np.array([file.poses[name] for _, name in rows])
    # To the bit where it is a quaternion already.
    norm = np.linalg.norm(params[:, :4], axis=1, keepdims=True)
    params[:, :4] = np.where(np.abs(norm - 1) < 1e-9, params[:, :4], params[:, :4] / norm)
    poses = KnownPoses(
        images=np.array([image for image, _ in rows], np.int32), params=params, is_fixed=config.poses_mode == "fixed"
    )
    return replace(known, photos=photos, poses=poses, source=str(file.path))


def _restricted(photos: ImageSet, names: set[str], path: Path) -> ImageSet:
    kept = tuple(record for record in photos.records if record.name in names)
    if len(kept) < 2:
        raise InputError(f"{path} tells the poses of {len(kept)} of the photos; it takes two or more")
    reason = f"has no pose in {path}"
    left = tuple(LeftOut(name=name, reason=reason) for name in photos.names if name not in names)
    return replace(photos, records=kept, left_out=photos.left_out + left)


def _with_cameras(known: Known, config: KnownConfig, file: KnownFile, progress: Progress) -> Known:
    if file.unnamed:
        given = _by_size(file, known.photos)
    elif file.cameras:
        photo_of = _find_photos(file.path, file.cameras, known.photos, "camera", progress)
        given = {photo: file.cameras[name] for name, photo in photo_of.items()}
    else:
        raise InputError(
            f"{file.path} tells no camera: a gt.json needs K of the images, a transforms.json fl_x, fl_y, cx and cy"
        )
    fixed = config.intrinsics_mode == "fixed"
    group_of, cameras, scaled = {}, {}, []
    for record in known.photos.records:
        if record.name not in given:
            continue
        camera = replace(_fitted(given[record.name], record, file.path), is_fixed=fixed)
        if (camera.width_px, camera.height_px) != (given[record.name].width_px, given[record.name].height_px):
            scaled.append(record.name)
        size = f"{camera.width_px}x{camera.height_px}"
        group = f"{config.intrinsics_mode} {camera.model} {size} {camera.params.tolist()}"
        group_of[record.name], cameras[group] = group, camera
    if scaled:
        one = given[scaled[0]]
        photo = next(record for record in known.photos.records if record.name == scaled[0])
        progress.note(
            f"{file.path}: cameras of {one.width_px}×{one.height_px} pixels were scaled to {len(scaled)} photos of "
            f"{photo.width_px}×{photo.height_px}"
        )
    if config.intrinsics_of_groups:
        group_of |= _of_groups(known.photos.records, group_of)
    left = [name for name in known.photos.names if name not in group_of]
    if left:
        progress.note(f"{len(left)} photos have no camera in {file.path}, which is estimated: {some_of(left)}")
    records = tuple(
        replace(record, camera_group=group_of.get(record.name, record.camera_group)) for record in known.photos.records
    )
    return replace(known, photos=replace(known.photos, records=records), cameras=cameras)


def _of_groups(records: Sequence[ImageRecord], group_of: Mapping[str, str]) -> dict[str, str]:
    """The known cameras of photos without one, where all others of their group have the same."""
    found: dict[str, set[str]] = {}
    for record in records:
        if record.name in group_of:
            found.setdefault(record.camera_group, set()).add(group_of[record.name])
    return {
        record.name: next(iter(found[record.camera_group]))
        for record in records
        if record.name not in group_of and len(found.get(record.camera_group, ())) == 1
    }


def _by_size(file: KnownFile, photos: ImageSet) -> dict[str, Camera]:
    """The camera of a list without names that each photo has by its size."""
    given = {}
    for record in photos.records:
        exact = [c for c in file.unnamed if (c.width_px, c.height_px) == (record.width_px, record.height_px)]
        fitting = exact or [camera for camera in file.unnamed if _fits(camera, record)]
        if len({repr(_plain(camera)) for camera in fitting}) > 1:
            raise InputError(
                f"{file.path} has {len(fitting)} cameras for photos of {record.width_px}×{record.height_px} pixels, as "
                f"{record.name} is one: give a file that says which photo was taken with which, such as the whole model"
            )
        if fitting:
            given[record.name] = fitting[0]
    if not given:
        sizes = sorted({f"{camera.width_px}×{camera.height_px}" for camera in file.unnamed})
        first = photos.records[0]
        raise InputError(
            f"{file.path} has cameras of {some_of(sizes)} pixels, but no photo has such a size or shape: {first.name} "
            f"has {first.width_px}×{first.height_px}, as stored, before any EXIF rotation"
        )
    return given


def _fits(camera: Camera, record: ImageRecord) -> bool:
    """Whether the photo has the camera's shape, to the rounding of its sides to whole pixels."""
    scale = record.width_px / camera.width_px
    return abs(camera.height_px * scale - record.height_px) <= _MAX_ASPECT_PX


def _fitted(camera: Camera, record: ImageRecord, path: Path) -> Camera:
    if (camera.width_px, camera.height_px) == (record.width_px, record.height_px):
        return camera
    if not _fits(camera, record):
        turned = (camera.height_px, camera.width_px) == (record.width_px, record.height_px)
        hint = (
            "it is the camera of the photo turned upright, but photos are taken as stored, before any EXIF rotation"
            if turned
            else "cameras are scaled only to photos of the same shape"
        )
        raise InputError(
            f"{path}: the camera of {record.name} has {camera.width_px}×{camera.height_px} pixels, but the photo has "
            f"{record.width_px}×{record.height_px}; {hint}"
        )
    return rescaled(camera, record.width_px, record.height_px)


def _find_photos(
    path: Path, named: Mapping[str, object], photos: ImageSet, what: str, progress: Progress
) -> dict[str, str]:
    photo_of = match_names(named, photos.names)
    unknown = sorted(set(named) - set(photo_of))
    if not photo_of:
        raise InputError(
            f"{path} names none of the photos: it has {some_of(unknown)}, and the photos are {some_of(photos.names)}; "
            "names are paths relative to the folder of the photos"
        )
    if unknown:
        progress.note(
            f"{path} tells the {what} of {len(unknown)} images that are not among the photos: {some_of(unknown)}"
        )
    return photo_of


def known_keys(key: str, *parts: tuple[object, ...]) -> str:
    """A cache key with what is known in it; the same key where nothing is."""
    return fingerprint(key, parts) if any(parts) else key


def _plain(camera: Camera) -> dict[str, object]:
    return {**asdict(camera), "params": camera.params.tolist()}
