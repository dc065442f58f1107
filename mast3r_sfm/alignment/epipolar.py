"""Poses and focal lengths that agree best with all matches at once, without any point: epipolar refinement.

A pair's pose is found with a guessed focal length, and with no other pair to help where it has little depth; averages
over pairs inherit both. Here the sum of all matches' Sampson errors (Hartley & Zisserman, 11.4.3) is minimised over the
poses and the focal lengths of all images together, by Levenberg–Marquardt. Epipolar lines say nothing of how long
baselines are where the cameras stand in a row, so lengths are held near those that the averages found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import splu
from scipy.spatial.transform import Rotation

from mast3r_sfm.geometry.rigid import camera_centre, make_pose
from mast3r_sfm.types import Bool, Float64, Int32, PairMatches, Rig

MATCHES_PER_EDGE = 200
"""Evenly picked from best to worst: more make it slower rather than better."""
MAX_MATCHES, FEW_MATCHES = 500_000, 30
"""Of a part, so that memory stays below a gigabyte; an edge gets FEW_MATCHES all the same."""
KERNELS_PX = (4.0, 0.5)
"""Sampson errors, in pixels of matching, at which the loss begins to level off, one after the other."""
BASELINE_SIGMA = 0.3
"""By how much, relatively, the length of a baseline is known from the averages. On a street, 1.0 doubles the error of
positions; 0.1 holds ten photos of ten unknown cameras where wrong focal lengths put them."""
FOCAL_SIGMA = 0.5
"""The same of a focal length that was guessed."""
MAX_STEPS = 30
ROUGH, CONVERGED = 1e-2, 1e-5
"""Relative decrease of the loss at which a kernel before the last is done, and the last one."""
_START_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 1e-3, 1e-12, 1e8
_KNOWN_SIGMA = 1e-6


@dataclass(frozen=True, kw_only=True)
class EpipolarProblem:
    """Matches of E edges between n images by C cameras, K of each edge."""

    pairs: Int32
    """[E, 2] local image numbers."""
    pixels: Float64
    """[E, K, 2, 2] of either side, relative to the principal point."""
    weight: Float64
    """[E, K] 0 where an edge has fewer matches."""
    camera: Int32
    """[n]."""
    is_known: Bool
    """[C] cameras whose focal length stays."""

    @classmethod
    def of(cls, matches: Sequence[PairMatches], images: Int32, rig: Rig, pixel_scale: float) -> EpipolarProblem:
        """The problem of some images, in pixels of matching.

        Args:
            matches: verified pairs among the images.
            images: [n] ascending.
            rig: cameras in photo pixels.
            pixel_scale: photo pixels per pixel of matching.
        """
        most = min(MATCHES_PER_EDGE, max(MAX_MATCHES // len(matches), FEW_MATCHES))
        count = min(max(len(match) for match in matches), most)
        pixels, weight = np.zeros((len(matches), count, 2, 2)), np.zeros((len(matches), count))
        for edge, match in enumerate(matches):
            some = np.linspace(0, len(match) - 1, min(len(match), count)).astype(int)
            for side, (image, xy) in enumerate(((match.first, match.xy_first), (match.second, match.xy_second))):
                middle = rig.cameras[rig.camera_of_image[image]].params[-2:]
                pixels[edge, : len(some), side] = (xy[some] - middle) / pixel_scale
            weight[edge, : len(some)] = 1.0
        used, local = np.unique(rig.camera_of_image[images], return_inverse=True)
        pairs = np.searchsorted(images, [(match.first, match.second) for match in matches])
        return cls(
            pairs=pairs.astype(np.int32),
            pixels=pixels,
            weight=weight,
            camera=local.astype(np.int32),
            is_known=np.array([rig.cameras[number].focal_is_known for number in used], np.bool_),
        )


@dataclass(frozen=True, kw_only=True)
class Cameras:
    """Where the images stand."""

    rotation: Float64
    """[n, 3, 3] world-to-camera."""
    centre: Float64
    """[n, 3]."""
    log_focal: Float64
    """[C] of the focal length in pixels of matching."""

    def moved(self, step: Float64) -> Cameras:
        """By [6n + C]: turns in the world, then shifts, then logarithms of focal lengths."""
        count = len(self.centre)
        turn = Rotation.from_rotvec(step[: 3 * count].reshape(-1, 3)).as_matrix()
        return Cameras(
            rotation=self.rotation @ turn.transpose(0, 2, 1),
            centre=self.centre + step[3 * count : 6 * count].reshape(-1, 3),
            log_focal=self.log_focal + step[6 * count :],
        )


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """The outcome."""

    cam_from_world: Float64
    """[n, 3, 4]."""
    focal: Float64
    """[n] in pixels of matching."""
    history: tuple[float, ...]
    """The loss after each step with the last kernel."""
    steps: int
    """With all kernels."""


def refine_poses(problem: EpipolarProblem, cam_from_world: Float64, focal: Float64) -> Refinement:
    """Poses and focal lengths of least Sampson errors.

    Args:
        problem: its edges connect all images.
        cam_from_world: [n, 3, 4] to start from.
        focal: [n] in pixels of matching, the same for all images of a camera.
    """
    log_focal = np.zeros(len(problem.is_known))
    log_focal[problem.camera] = np.log(focal)
    start = Cameras(rotation=cam_from_world[:, :, :3], centre=camera_centre(cam_from_world), log_focal=log_focal)
    cameras, steps = start, 0
    for kernel in KERNELS_PX:
        enough = CONVERGED if kernel == KERNELS_PX[-1] else ROUGH
        cameras, history = _minimise(_Loss(problem=problem, start=start, kernel=kernel), cameras, enough)
        steps += len(history) - 1
    return Refinement(
        cam_from_world=make_pose(cameras.rotation, -(cameras.rotation @ cameras.centre[:, :, None])[:, :, 0]),
        focal=np.exp(cameras.log_focal)[problem.camera],
        history=tuple(history),
        steps=steps,
    )


@dataclass(frozen=True, kw_only=True)
class _Rays:
    """One side of all matches, in the world."""

    ray: Float64
    """[E, K, 3] of depth 1."""
    slope: Float64
    """[E, K, 3] the part of the ray that shrinks as the focal length grows."""
    to_image: Float64
    """[E, 2, 3] a ray's change by a change of the pixel, transposed."""

    def in_image(self, by_ray: Float64) -> Float64:
        """A derivative by the ray [E, K, 3] as one by the pixel [E, K, 2]."""
        return np.asarray(by_ray @ self.to_image.transpose(0, 2, 1), np.float64)

    def in_world(self, by_pixel: Float64) -> Float64:
        """The change of the ray [E, K, 3] by a change of the pixel [E, K, 2]."""
        return np.asarray(by_pixel @ self.to_image, np.float64)


class _Sampson:
    """Sampson errors of all matches: base · (ray × ray') over the length of its derivative by all four pixels."""

    def __init__(self, one: _Rays, two: _Rays, base: Float64) -> None:
        self._one, self._two, self._base = one, two, base
        self._by_one, self._by_two = np.cross(two.ray, base), np.cross(base, one.ray)
        self._algebraic = (one.ray * self._by_one).sum(axis=-1)
        self._gradients = one.in_image(self._by_one), two.in_image(self._by_two)
        self._squares = [(gradient**2).sum(axis=-1) for gradient in self._gradients]
        self._length = np.sqrt(np.maximum(sum(self._squares), 1e-30))

    @property
    def error(self) -> Float64:
        """[E, K] in pixels."""
        return np.asarray(self._algebraic / self._length, np.float64)

    def derivatives(self) -> Float64:
        """[E, K, 14] by turns and shifts of both images in the world and by the logarithms of both focal lengths."""
        one, two, base = self._one, self._two, self._base
        by_one, by_two = self._by_one, self._by_two
        back_one, back_two = one.in_world(self._gradients[0]), two.in_world(self._gradients[1])
        from_two, from_one = np.cross(back_two, base), np.cross(base, back_one)
        numerator = [
            np.cross(one.ray, by_one),
            np.cross(two.ray, by_two),
            np.cross(one.ray, two.ray),
            -(one.slope * by_one).sum(axis=-1, keepdims=True),
            -(two.slope * by_two).sum(axis=-1, keepdims=True),
        ]
        half_squared_length = [
            np.cross(one.ray, from_two) - np.cross(by_one, back_one),
            np.cross(two.ray, from_one) - np.cross(by_two, back_two),
            np.cross(back_one, two.ray) + np.cross(one.ray, back_two),
            -self._squares[0][..., None] - (one.slope * from_two).sum(axis=-1, keepdims=True),
            -self._squares[1][..., None] - (two.slope * from_one).sum(axis=-1, keepdims=True),
        ]
        length = self._length[..., None]
        turn_one, turn_two, shift, focal_one, focal_two = (
            (above - below * self.error[..., None] / length) / length
            for above, below in zip(numerator, half_squared_length, strict=True)
        )
        return np.concatenate([turn_one, turn_two, shift, -shift, focal_one, focal_two], axis=-1)


@dataclass(frozen=True, kw_only=True)
class _Held:
    """Residuals [Q] that keep something where it was, derivatives [Q, k], and the unknowns [Q, k] that these are by."""

    residual: Float64
    by: Float64
    column: Int32


@dataclass(frozen=True, kw_only=True)
class _Loss:
    problem: EpipolarProblem
    start: Cameras
    kernel: float

    def sampson(self, cameras: Cameras) -> _Sampson:
        """The errors of all matches."""
        first, second = self.problem.pairs[:, 0], self.problem.pairs[:, 1]
        base = (cameras.centre[first] - cameras.centre[second])[:, None]
        return _Sampson(self._rays(cameras, 0), self._rays(cameras, 1), base)

    def _rays(self, cameras: Cameras, side: int) -> _Rays:
        image = self.problem.pairs[:, side]
        focal = np.exp(cameras.log_focal)[self.problem.camera[image]]
        scaled = self.problem.pixels[:, :, side] / focal[:, None, None]
        slope = np.concatenate([scaled, np.zeros_like(scaled[..., :1])], axis=-1)
        rotation = cameras.rotation[image]
        return _Rays(
            ray=(slope + np.array([0.0, 0.0, 1.0])) @ rotation,
            slope=slope @ rotation,
            to_image=rotation[:, :2] / focal[:, None, None],
        )

    def value(self, cameras: Cameras) -> float:
        """Robust loss of all matches, and what holds lengths of baselines and focal lengths."""
        robust = np.log1p((self.sampson(cameras).error / self.kernel) ** 2)
        held = sum(float((held.residual**2).sum()) for held in self._held(cameras))
        return float((self.problem.weight * robust).sum()) + held

    def _held(self, cameras: Cameras) -> list[_Held]:
        problem, count = self.problem, len(cameras.centre)
        base, before = (
            one.centre[problem.pairs[:, 0]] - one.centre[problem.pairs[:, 1]] for one in (cameras, self.start)
        )
        length, length_before = (np.maximum(np.linalg.norm(one, axis=1), 1e-12) for one in (base, before))
        along = base / (length**2)[:, None] / BASELINE_SIGMA
        sigma = np.where(problem.is_known, _KNOWN_SIGMA, FOCAL_SIGMA)
        return [
            _Held(
                residual=np.log(length / length_before) / BASELINE_SIGMA,
                by=np.concatenate([along, -along], axis=1),
                column=self._columns(count)[:, 6:12],
            ),
            _Held(
                residual=(cameras.log_focal - self.start.log_focal) / sigma,
                by=1 / sigma[:, None],
                column=np.arange(len(sigma), dtype=np.int32)[:, None] + 6 * count,
            ),
        ]

    def _columns(self, count: int) -> Int32:
        """[E, 14] the unknowns by which `derivatives` are."""
        problem, axes = self.problem, np.arange(3, dtype=np.int32)
        first, second = (problem.pairs[:, side, None] for side in range(2))
        turns, shifts = 3 * np.concatenate([first, second], axis=1), 3 * count
        places = (turns[:, :, None] + axes).reshape(len(first), 6)
        focal = problem.camera[problem.pairs] + 6 * count
        return np.concatenate([places, places + shifts, focal], axis=1).astype(np.int32)

    def normal_equations(self, cameras: Cameras) -> tuple[scipy.sparse.csc_array, Float64]:
        """Matrix and right-hand side of a Gauss–Newton step."""
        sampson = self.sampson(cameras)
        by = sampson.derivatives()
        weight = self.problem.weight / (self.kernel**2 + sampson.error**2)
        blocks = [(by * weight[..., None]).transpose(0, 2, 1) @ by]
        rights = [-((by * (weight * sampson.error)[..., None]).sum(axis=1))]
        columns = [self._columns(len(cameras.centre))]
        for held in self._held(cameras):
            blocks.append(held.by[:, :, None] * held.by[:, None, :])
            rights.append(-held.by * held.residual[:, None])
            columns.append(held.column)
        size = 6 * len(cameras.centre) + len(self.problem.is_known)
        rows = np.concatenate([np.repeat(column, column.shape[1], axis=1).ravel() for column in columns])
        across = np.concatenate([np.tile(column, column.shape[1]).ravel() for column in columns])
        values = np.concatenate([block.ravel() for block in blocks])
        right = np.zeros(size)
        np.add.at(
            right, np.concatenate([column.ravel() for column in columns]), np.concatenate([r.ravel() for r in rights])
        )
        return scipy.sparse.coo_array((values, (rows, across)), shape=(size, size)).tocsc(), right


def _minimise(loss: _Loss, cameras: Cameras, least_decrease: float) -> tuple[Cameras, list[float]]:
    """Levenberg–Marquardt: the cameras of least loss, and the loss after each step."""
    damping, history = _START_DAMPING, [loss.value(cameras)]
    for _ in range(MAX_STEPS):
        matrix, right = loss.normal_equations(cameras)
        diagonal = np.maximum(matrix.diagonal(), _LEAST_DAMPING)
        while damping < _MOST_DAMPING:
            damped = scipy.sparse.csc_array(matrix + scipy.sparse.diags_array(damping * diagonal))
            tried = cameras.moved(_solve(damped, right))
            value = loss.value(tried)
            if value < history[-1]:
                break
            damping *= 10
        else:
            break
        cameras, damping = tried, max(damping / 10, _LEAST_DAMPING)
        history.append(value)
        if history[-2] - value < least_decrease * history[-2]:
            break
    return cameras, history


def _solve(matrix: scipy.sparse.csc_array, right: Float64) -> Float64:
    """Of a symmetric positive matrix; nothing where it is singular all the same, so that it is damped more."""
    try:
        found = splu(matrix, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve(right)
    except RuntimeError:
        return np.zeros_like(right)
    return np.where(np.isfinite(found).all(), found, 0.0)
