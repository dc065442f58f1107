"""True camera poses to compare a reconstruction with."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.errors import InputError, ShapeError
from mast3r_sfm.types import Float64

# Poses are often written with four or five digits; what is farther from a rotation than this is something else.
_ROTATION_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Truth:
    """True poses of a collection, by image name."""

    cam_from_world: Mapping[str, Float64]
    """[3, 4] each."""
    scene: Mapping[str, str]
    """For each image of `cam_from_world`, the scene it shows; poses compare only inside one scene."""
    intrinsics: Mapping[str, Float64] = field(default_factory=dict)
    """[3, 3] in COLMAP's pixels (centre of the first at (0.5, 0.5)), of those images where they are known."""
    unrelated: tuple[str, ...] = ()
    """Sorted names of images that belong to no scene and must stay out of every model."""

    def __post_init__(self) -> None:
        if set(self.scene) != set(self.cam_from_world):
            raise ShapeError("Truth.scene must name the same images as Truth.cam_from_world")
        both = sorted(set(self.unrelated) & set(self.cam_from_world))
        if both:
            raise ShapeError(f"Truth: {both[0]} has a pose and is unrelated as well")
        for name, pose in self.cam_from_world.items():
            if pose.shape != (3, 4) or not np.isfinite(pose).all():
                raise ShapeError(f"Truth: the pose of {name} must be finite and [3, 4], not {pose.shape}")

    @property
    def names_by_scene(self) -> dict[str, tuple[str, ...]]:
        """Sorted names of the images of each scene; scenes sorted as well."""
        return {
            scene: tuple(sorted(name for name, its_scene in self.scene.items() if its_scene == scene))
            for scene in sorted(set(self.scene.values()))
        }

    def restricted_to(self, names: Collection[str]) -> Truth:
        """The truth of those of its images that are among `names`."""
        return Truth(
            cam_from_world={name: pose for name, pose in self.cam_from_world.items() if name in names},
            scene={name: scene for name, scene in self.scene.items() if name in names},
            intrinsics={name: matrix for name, matrix in self.intrinsics.items() if name in names},
            unrelated=tuple(name for name in self.unrelated if name in names),
        )


def truth_from_poses(poses: Mapping[str, NDArray[np.floating[Any]]]) -> Truth:
    """A truth of one scene from cam_from_world matrices [3, 4] by image name, for example of another COLMAP model.

    Raises:
        InputError: fewer than two images.
        ShapeError: a matrix is not finite or not [3, 4].
    """
    if len(poses) < 2:
        raise InputError(f"the truth has {len(poses)} image(s); it takes two or more to compare poses")
    return Truth(
        cam_from_world={name: np.asarray(pose, dtype=np.float64) for name, pose in poses.items()},
        scene=dict.fromkeys(poses, ""),
    )


def read_truth_json(path: Path) -> Truth:
    """Read a `gt.json`.

    The file holds `images`: for each name `R` [3, 3] and `t` [3] with x_cam = R x_world + t in OpenCV axes and, where
    known, `K` [3, 3] whose pixels have the centre of the first at (0, 0), and `scene`, a text. Beside it, `unrelated`
    lists the names of images that must stay out.

    Raises:
        InputError: the file cannot be read or does not have this form; the message says where.
    """
    data = load_object(path)
    images = data.get("images")
    if not isinstance(images, dict) or len(images) < 2:
        raise InputError(f'{path}: "images" must map two or more image names to their R and t')
    poses, scenes, intrinsics = {}, {}, {}
    for name, entry in images.items():
        where = f"{path}: images[{name!r}]"
        if not isinstance(entry, dict):
            raise InputError(f"{where} must be an object with R and t")
        rotation = read_rotation(entry.get("R"), f"{where}.R")
        translation = read_numbers(entry.get("t"), (3,), f"{where}.t")
        poses[name] = np.column_stack([rotation, translation])
        scenes[name] = str(entry.get("scene", ""))
        if entry.get("K") is not None:
            matrix = read_numbers(entry["K"], (3, 3), f"{where}.K")
            matrix[:2, 2] += 0.5
            intrinsics[name] = matrix
    unrelated = data.get("unrelated", [])
    if not isinstance(unrelated, list) or not all(isinstance(name, str) for name in unrelated):
        raise InputError(f'{path}: "unrelated" must be a list of image names')
    for name in unrelated:
        if name in poses:
            raise InputError(f"{path}: {name!r} is in both images and unrelated; remove it from one of them")
    return Truth(cam_from_world=poses, scene=scenes, intrinsics=intrinsics, unrelated=tuple(sorted(set(unrelated))))


def load_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the truth {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f'{path}: expected an object with "images" that maps image names to their R and t')
    return data


def read_numbers(value: object, shape: tuple[int, ...], where: str) -> Float64:
    """Finite numbers of a shape, as JSON has them; `where` says in an error what they are.

    Raises:
        InputError: it is something else.
    """
    wanted = "×".join(map(str, shape))
    if value is None:
        raise InputError(f"{where} is missing; it must hold {wanted} numbers")
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} must hold {wanted} numbers: {error}") from error
    if array.shape != shape:
        raise InputError(f"{where} must hold {wanted} numbers, not an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{where} holds NaN or infinite values")
    return array


def read_rotation(value: object, where: str) -> Float64:
    """The rotation [3, 3] nearest to a matrix that was written with a few digits; `where` as for `read_numbers`.

    Raises:
        InputError: it is no rotation.
    """
    matrix = read_numbers(value, (3, 3), where)
    error = float(np.abs(matrix @ matrix.T - np.eye(3)).max())
    if error > _ROTATION_TOLERANCE or np.linalg.det(matrix) < 0:
        raise InputError(
            f"{where} is no rotation matrix (R Rᵀ is {error:.2g} off the identity, determinant "
            f"{np.linalg.det(matrix):.3g}); write x_cam = R x_world + t"
        )
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ right)
