"""Bringing a finished model to known positions of its cameras: GPS of the photos, or surveyed places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.errors import InputError, ShapeError
from mast3r_sfm.geometry.geodesy import LocalFrame
from mast3r_sfm.geometry.rigid import camera_centre, rotation_from_axis_angle
from mast3r_sfm.geometry.similarity import Similarity, align_similarity_robust
from mast3r_sfm.images.framing import stored_from_upright
from mast3r_sfm.images.positions import PhotoPosition, read_positions
from mast3r_sfm.types import Bool, Float64

MIN_POSITIONS = 3
MAX_ERROR_SHARE = 0.5
"""Root mean square error of the cameras that agree, over their spread, from which positions say nothing of a model."""
MAX_TILT_DEG = 5.0
"""Uncertainty of the rotation about the line that positions lie along, above which they do not tell it."""
_SIDE_WEIGHT = 0.1
"""Of the cameras' mean upward direction, beside what their horizontal axes say of it."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Where cameras were, in a frame of its own."""

    positions: Mapping[str, Float64]
    """[3] by the photo's name."""
    frame: LocalFrame | None = None
    """What the positions are metres in, where they come from GPS; its third axis points up."""
    orientations: Mapping[str, int] = field(default_factory=dict)
    """EXIF orientation of the photos; with a frame, their cameras are taken to have been held level."""
    notes: tuple[str, ...] = ()
    """What is to be known of the positions."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How a model lies in the frame of a reference, and how well it fits there."""

    similarity: Similarity
    """reference_from_model."""
    names: tuple[str, ...]
    """Of the n images compared, sorted."""
    distances: Float64
    """[n] from each camera to its known position, in units of the reference."""
    inliers: Bool
    """[n] whose positions the similarity was fitted to; the others are wrong, or their cameras are."""
    tilt_deg: float
    """Standard deviation of the rotation about the line that the positions lie along, as they tell it."""
    is_levelled: bool
    """Positions do not tell that rotation, and it was found from how the cameras were held."""

    @property
    def median_error(self) -> float:
        """Of all images compared."""
        return float(np.median(self.distances))

    @property
    def max_error_of_agreeing(self) -> float:
        """Of the inliers."""
        return float(self.distances[self.inliers].max())

    @property
    def disagreeing(self) -> dict[str, float]:
        """How far the images lie from positions that do not fit, the farthest first."""
        order = np.argsort(-self.distances, kind="stable")
        return {self.names[row]: float(self.distances[row]) for row in order.tolist() if not self.inliers[row]}


def gps_reference(names: Sequence[str], photos: Path) -> Reference:
    """Where the photos `names` below the folder `photos` were taken, in metres around their middle.

    Where three and more photos know their altitude, the others are not used. Where fewer do, all are taken to have been
    at one height.

    Raises:
        InputError: fewer than three of the photos have a GPS position.
    """
    found = read_positions(photos, names)
    if len(found) < MIN_POSITIONS:
        raise InputError(
            f"{len(found)} of the model's {len(names)} photos have a GPS position in their EXIF data; it takes three "
            "or more, or --positions with a list of known ones"
        )
    used, notes = _with_altitude(found)
    gps = [position.gps for position in used.values()]
    frame = LocalFrame.around(gps)
    return Reference(
        positions=dict(zip(used, frame.local(gps), strict=True)),
        frame=frame,
        orientations={name: position.orientation for name, position in used.items()},
        notes=notes,
    )


def _with_altitude(found: Mapping[str, PhotoPosition]) -> tuple[dict[str, PhotoPosition], tuple[str, ...]]:
    known = {name: position for name, position in found.items() if position.has_altitude}
    missing = len(found) - len(known)
    if not missing:
        return known, ()
    if len(known) >= MIN_POSITIONS:
        return known, (f"{missing} photos with a GPS position have no altitude, and are not used",)
    level = {
        name: PhotoPosition(gps=(*position.gps[:2], 0.0), has_altitude=False, orientation=position.orientation)
        for name, position in found.items()
    }
    return level, (f"{missing} of {len(found)} photos have no altitude: all are taken to have been at one height",)


def place(model: ColmapModel, reference: Reference, seed: int = 0) -> Placement:
    """Find the similarity that brings a model's cameras to their known positions; up to half of these may be wrong.

    Args:
        model: it is not changed.
        reference: known positions, of at least three of the model's images.
        seed: of the sampling.

    Raises:
        InputError: there are too few positions, they coincide or lie on one line, or they do not fit the model.
    """
    poses = model.cam_from_world
    names = tuple(name for name in poses if name in reference.positions)
    if len(names) < MIN_POSITIONS:
        raise InputError(
            f"{len(names)} of the model's {len(poses)} images have a known position, and it takes three or more; "
            f"images are named as {min(poses)}, positions as {min(reference.positions, default='none')}"
        )
    source = camera_centre(np.stack([poses[name] for name in names]))
    target = np.stack([reference.positions[name] for name in names])
    try:
        similarity, inliers = align_similarity_robust(source, target, seed=seed)
    except ShapeError as error:
        raise InputError(f"the model cannot be brought to these positions: {error}") from error
    _check_fit(similarity, source[inliers], target[inliers])
    tilt_deg = _tilt_deg(similarity, source[inliers], target[inliers])
    is_levelled = tilt_deg > MAX_TILT_DEG and reference.frame is not None
    if is_levelled:
        up = _upward([poses[name] for name in names], [reference.orientations.get(name, 1) for name in names])
        similarity = _levelled(similarity, source[inliers], target[inliers], up)
    elif tilt_deg > MAX_TILT_DEG:
        raise InputError(
            f"the {len(names)} known positions lie too nearly on one line: they leave the rotation about it open "
            f"(±{min(tilt_deg, 180.0):.0f}°); give positions of cameras to the side of it as well"
        )
    return Placement(
        similarity=similarity,
        names=names,
        distances=np.linalg.norm(similarity.apply(source) - target, axis=1),
        inliers=inliers,
        tilt_deg=tilt_deg,
        is_levelled=is_levelled,
    )


def _check_fit(similarity: Similarity, source: Float64, target: Float64) -> None:
    """Refuse a similarity that explains its own inliers hardly better than their mean does."""
    error = _rms(similarity.apply(source) - target)
    spread = _rms(target - target.mean(axis=0))
    if error > MAX_ERROR_SHARE * spread:
        raise InputError(
            f"the known positions do not fit the model: where they agree best, they are {error:.3g} off, and they are "
            f"spread over no more than {spread:.3g}; check that they belong to these images, and are exact enough"
        )


def _rms(offsets: Float64) -> float:
    return float(np.sqrt((offsets**2).sum(axis=1).mean()))


def _tilt_deg(similarity: Similarity, source: Float64, target: Float64) -> float:
    """Standard deviation of the rotation about the principal axis of the cameras; infinite for cameras on a line."""
    placed = similarity.apply(source)
    freedom = max(3 * len(source) - 7, 1)
    deviation = np.sqrt(((placed - target) ** 2).sum() / freedom)
    spread = np.linalg.svd(placed - placed.mean(axis=0), compute_uv=False)
    lever = float(np.hypot(*spread[1:3]))
    # Rounding of exact positions on a line must not pass for a lever.
    if lever <= 1e-6 * float(spread[0]):
        return float("inf")
    return float(np.degrees(np.arctan2(deviation, lever)))


def _upward(poses: Sequence[Float64], orientations: Sequence[int]) -> Float64:
    """[3] the upward direction of a model whose cameras were held level.

    The horizontal axes of level cameras lie in one plane (Brown and Lowe, "Automatic Panoramic Image Stitching using
    Invariant Features", IJCV 2007, section 5); where cameras look the same way, their mean vertical axis decides.
    """
    across, upward = [], []
    for pose, orientation in zip(poses, orientations, strict=True):
        right, down = stored_from_upright(orientation).T
        across.append(right @ pose[:2, :3])
        upward.append(-down @ pose[:2, :3])
    mean = np.mean(upward, axis=0)
    mean /= np.linalg.norm(mean).clip(min=1e-12)
    sideways = np.array(across)
    _, axes = np.linalg.eigh(sideways.T @ sideways / len(sideways) + _SIDE_WEIGHT * (np.eye(3) - np.outer(mean, mean)))
    up: Float64 = axes[:, 0] * (1.0 if axes[:, 0] @ mean > 0 else -1.0)
    return up


def _levelled(similarity: Similarity, source: Float64, target: Float64, up: Float64) -> Similarity:
    """Turn about the line of the cameras until the model's upward direction is as near to the third axis as it gets."""
    placed = similarity.apply(source)
    centre = placed.mean(axis=0)
    line = np.linalg.svd(placed - centre)[2][0]
    ours, wanted = (
        direction - line * (direction @ line) for direction in (similarity.rotation @ up, np.array([0.0, 0.0, 1.0]))
    )
    angle = np.arctan2(line @ np.cross(ours, wanted), ours @ wanted)
    turn = rotation_from_axis_angle(angle * line)
    rotation = turn @ similarity.rotation
    middle = target.mean(axis=0)
    return Similarity(
        scale=similarity.scale,
        rotation=rotation,
        translation=middle - similarity.scale * rotation @ source.mean(axis=0),
    )


def read_position_list(path: Path) -> dict[str, Float64]:
    """Positions [3] by name from lines of a name, which may have spaces, and x y z; lines with # are passed over.

    Raises:
        InputError: the file cannot be read, or a line is no position or the second one of its name.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise InputError(f"cannot read the positions {path}: {reason}") from error
    found: dict[str, Float64] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, *values = text.rsplit(maxsplit=3)
        try:
            position = np.array([float(value) for value in values])
        except ValueError:
            position = np.zeros(0)
        if position.shape != (3,) or not np.isfinite(position).all():
            raise InputError(f"{path}, line {number}: write a name and x y z, not {text[:80]!r}")
        if name in found:
            raise InputError(f"{path}, line {number}: {name} stands there twice")
        found[name] = position
    return found
