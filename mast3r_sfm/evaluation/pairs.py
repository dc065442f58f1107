"""Errors of relative poses, over all pairs of images of a scene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.geometry.rigid import angle_between_rotations, camera_centre
from mast3r_sfm.types import Float64

# Two true centres closer than this share of the largest distance are one: their direction is rounding, not truth.
_SAME_CENTRE = 1e-6
_FAILED_DEG = 180.0


@dataclass(frozen=True, kw_only=True)
class PairErrors:
    """Errors of the relative pose of P pairs of images, in degrees."""

    rotation_deg: Float64
    """[P]; 180 for a pair that stands in no model together."""
    translation_deg: Float64
    """[P] between the true and the estimated direction; 180 as above; 0 where there is no true baseline."""
    has_baseline: NDArray[np.bool_]
    """[P] the two true centres differ; otherwise only the rotation can be judged."""
    is_measured: NDArray[np.bool_]
    """[P] both images stand in one model."""

    def __len__(self) -> int:
        return len(self.rotation_deg)

    @property
    def error_deg(self) -> Float64:
        """[P] the larger of both errors: the pair's pose error."""
        return np.maximum(self.rotation_deg, self.translation_deg)


@dataclass(frozen=True)
class _Placed:
    """The images of one scene in one model, in the order of the scene's names."""

    present: NDArray[np.bool_]
    rotation: Float64
    centre: Float64

    @classmethod
    def of(cls, names: Sequence[str], poses: Mapping[str, Float64]) -> _Placed:
        present = np.array([name in poses for name in names], dtype=np.bool_)
        stacked = np.stack([_checked(name, poses[name]) if name in poses else np.eye(3, 4) for name in names])
        return cls(present=present, rotation=stacked[:, :, :3], centre=camera_centre(stacked))


def _checked(name: str, pose: Float64) -> Float64:
    array = np.asarray(pose, dtype=np.float64)
    if array.shape != (3, 4) or not np.isfinite(array).all():
        raise ShapeError(f"the pose of {name} must be finite and [3, 4], not {array.shape}")
    return array


def direction_angle(first: Float64, second: Float64) -> Float64:
    """Angle in radians [...] between vectors [..., 3]; signs matter, lengths do not; π where a vector is zero.

    The arc cosine of a dot product would lose half of the digits near zero, just where a good reconstruction lies.
    """
    length_first = np.linalg.norm(first, axis=-1, keepdims=True)
    length_second = np.linalg.norm(second, axis=-1, keepdims=True)
    # W. Kahan's formula, 2 atan(‖a|b| − b|a|‖ / ‖a|b| + b|a|‖).
    left, right = first * length_second, second * length_first
    angle = 2.0 * np.arctan2(np.linalg.norm(left - right, axis=-1), np.linalg.norm(left + right, axis=-1))
    is_zero = (length_first * length_second)[..., 0] == 0.0
    return np.asarray(np.where(is_zero, np.pi, angle))


def measure_pairs(
    models: Sequence[Mapping[str, Float64]], truth: Mapping[str, Float64], names: Sequence[str]
) -> PairErrors:
    """Compare the relative poses of all pairs of `names`, in the order (0, 1), (0, 2), …, (1, 2), ….

    A pair is taken from the first model that holds both images. Work goes row by row, so that memory stays linear in
    the number of pairs.

    Args:
        models: cam_from_world [3, 4] by name; frames and scales are free.
        truth: cam_from_world [3, 4] of every one of `names`.
        names: images of one scene, at least one.

    Raises:
        ShapeError: a pose is not finite or not [3, 4].
    """
    true = _Placed.of(names, truth)
    estimates = [_Placed.of(names, model) for model in models]
    shortest = _SAME_CENTRE * _largest_distance(true.centre)
    rows = [_measure_row(first, true, estimates, shortest) for first in range(len(names))]
    return PairErrors(
        rotation_deg=np.concatenate([row.rotation_deg for row in rows]),
        translation_deg=np.concatenate([row.translation_deg for row in rows]),
        has_baseline=np.concatenate([row.has_baseline for row in rows]),
        is_measured=np.concatenate([row.is_measured for row in rows]),
    )


def join(parts: Sequence[PairErrors]) -> PairErrors:
    """The errors of several scenes as one; at least one part."""
    return PairErrors(
        rotation_deg=np.concatenate([part.rotation_deg for part in parts]),
        translation_deg=np.concatenate([part.translation_deg for part in parts]),
        has_baseline=np.concatenate([part.has_baseline for part in parts]),
        is_measured=np.concatenate([part.is_measured for part in parts]),
    )


def _measure_row(first: int, true: _Placed, estimates: Sequence[_Placed], shortest: float) -> PairErrors:
    """Errors of the pairs (first, first + 1), …, (first, N - 1)."""
    rotation, direction = _relative(true, first)
    baseline = np.linalg.norm(direction, axis=1)
    # A truth written as text repeats a centre up to rounding, however small the scene.
    has_baseline = baseline > max(shortest, 1e-12 * float(np.abs(true.centre).max()))
    rotation_deg = np.full(len(rotation), _FAILED_DEG)
    translation_deg = np.full(len(rotation), _FAILED_DEG)
    is_measured = np.zeros(len(rotation), dtype=np.bool_)
    for estimate in estimates:
        if not estimate.present[first]:
            continue
        new = estimate.present[first + 1 :] & ~is_measured
        its_rotation, its_direction = _relative(estimate, first)
        rotation_deg[new] = np.degrees(angle_between_rotations(its_rotation[new], rotation[new]))
        translation_deg[new] = np.degrees(direction_angle(its_direction[new], direction[new]))
        is_measured |= new
    translation_deg[~has_baseline] = 0.0
    return PairErrors(
        rotation_deg=rotation_deg,
        translation_deg=translation_deg,
        has_baseline=has_baseline,
        is_measured=is_measured,
    )


def _relative(placed: _Placed, first: int) -> tuple[Float64, Float64]:
    """Rotations [n, 3, 3] and translations [n, 3] other_from_first of all images after `first`."""
    others = placed.rotation[first + 1 :]
    rotation = others @ placed.rotation[first].T
    translation = np.einsum("nij,nj->ni", others, placed.centre[first] - placed.centre[first + 1 :])
    return rotation, translation


def _largest_distance(centres: Float64) -> float:
    return max(float(np.linalg.norm(centres - centre, axis=1).max()) for centre in centres)
