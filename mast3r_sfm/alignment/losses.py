"""The fine loss of the alignment of pointmaps, and its linearisation.

How far from the matched pixel does the point of one image project into the other? Summed over the matches by their
confidence, through a kernel of logarithmic growth (Cauchy): w · γ²/2 · log(1 + (r/γ)²).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse

from mast3r_sfm.alignment.canonical import GRID_PX
from mast3r_sfm.alignment.normal import (
    PER_IMAGE,
    DepthBlock,
    Depths,
    EdgeBlock,
    NormalEquations,
    edge_columns,
    sum_depths,
    sum_edges,
)
from mast3r_sfm.alignment.problem import LEAST_RELATIVE, Batch, PointmapProblem, Scene, camera_points, make_batches
from mast3r_sfm.geometry.rigid import rotation_from_axis_angle
from mast3r_sfm.types import Bool, Float64

_MIN_DEPTH = 1e-3
"""Of a projected point, over its distance: what is nearer to the image plane, or behind it, is treated as there."""
_AHEAD = 0.1
"""Cosine between the optical axis and the direction of a point beyond which it is not seen."""
_SPREAD_PX = GRID_PX / np.sqrt(12.0)
"""Standard deviation of places in a grid cell, along one axis."""
_TINY = 1e-12
GROUP_MATCHES = 1 << 17
"""Matches whose equations for depths are put together at a time."""


@dataclass(frozen=True, kw_only=True)
class Priors:
    """What is known beside the matches, as standard deviations; the weight of one is that of a residual of γ = 1."""

    log_depth: float = 0.05
    """Of the depths of anchors."""
    log_focal: float = 0.1
    """Of the focal lengths that canonical views imply."""


class FineLoss:
    """Reprojection error in pixels, both ways; moves poses, scales, focal lengths and depths."""

    def __init__(
        self,
        problem: PointmapProblem,
        kernel: float,
        priors: Priors,
        move_depths: bool = True,
        near: Scene | None = None,
    ) -> None:
        """Prepare the loss.

        Args:
            problem: what is given.
            kernel: γ in pixels.
            priors: on depths and focal lengths.
            move_depths: whether the depths of anchors are unknowns.
            near: about where the scene is, to allow for the matches' `place_error_px`; None: not to.
        """
        self.problem = problem
        self.kernel = kernel
        self.priors = priors
        self.move_depths = move_depths
        self._batches = make_batches(problem.start)
        self._groups = _by_source(problem)
        self._unsure = None if near is None or not problem.place_error_px else self._find_unsure(near)

    def residuals(self, scene: Scene) -> Float64:
        """[M, 2] distances in pixels from the match, of the point of each side in the other image."""
        return self._sizes(scene, weighed=False)

    def value(self, scene: Scene) -> float:
        """Mean over matches and both ways, and the priors."""
        weight = np.repeat(self.problem.weight[:, None], 2, axis=1)
        prior = (scene.log_depth / self.priors.log_depth) ** 2
        focal = (self._focal_change(scene) / self.priors.log_focal) ** 2
        total = 0.5 * (float(prior.sum()) + float(focal.sum())) / max(float(weight.sum()), 1e-300)
        return _cauchy(self._sizes(scene, weighed=True), weight, self.kernel) + total

    def linearise(self, scene: Scene, fixed: Bool) -> NormalEquations:
        """Normal equations of one step; unknowns that are `fixed` [P] stay."""
        images, cameras = self.problem.num_images, self.problem.num_cameras
        unknowns = PER_IMAGE * images + cameras
        blocks: list[EdgeBlock] = []
        depths: list[Depths] = []
        for group in self._groups:
            found = [self._linearise(scene, batch, side) for side, batch in group]
            blocks += [edges for edges, _ in found]
            if self.move_depths:
                said = [depth for _, depth in found]
                depths.append(sum_depths(said, unknowns, 1.0 / self.priors.log_depth**2, scene.log_depth))
        matrix, gradient = sum_edges(blocks, unknowns)
        camera, focal_weight = self.problem.camera_of_image, 1.0 / self.priors.log_focal**2
        prior = np.zeros(unknowns)
        prior[PER_IMAGE * images :] = focal_weight * np.bincount(camera, minlength=cameras)
        gradient[PER_IMAGE * images :] += focal_weight * np.bincount(camera, self._focal_change(scene), cameras)
        free = ~fixed
        free[PER_IMAGE * images :] &= ~self.problem.focal_is_known
        matrix = scipy.sparse.csr_array(matrix + scipy.sparse.diags_array(prior))
        anchors = len(scene.log_depth)
        return NormalEquations(matrix=matrix, gradient=gradient, depths=depths, num_anchors=anchors, free=free)

    def _sizes(self, scene: Scene, *, weighed: bool) -> Float64:
        size = np.zeros((len(self.problem.weight), 2))
        for batch in self._batches:
            for side in (0, 1):
                residual = self._project(scene, batch, side).residual
                if weighed:
                    residual = self._weigh(batch, side, residual)
                size[batch.rows, side] = np.linalg.norm(residual, axis=-1)
        return size

    def _find_unsure(self, scene: Scene) -> Float64:
        """[M, 2, 2] v of each side, with which an error e counts as e − v (v · e).

        A match is wrong by a pixel or so in either image. In the one that the point comes from, that makes its depth
        wrong where the surface is steep or ends, and the point appears displaced along its epipolar line. There, the
        error is divided by √(1 + s²), where s is the displacement in pixels.
        """
        change = self.problem.place_error_px * _change_of_depth(self.problem)
        unsure = np.zeros((len(self.problem.weight), 2, 2))
        for batch in self._batches:
            for side in (0, 1):
                shown = self._project(scene, batch, side)
                moved = ((_by_point(shown) @ shown.turn[:, None]) @ shown.points[..., None])[..., 0]
                length = np.maximum(np.linalg.norm(moved, axis=-1), _TINY)
                far = change[self.problem.anchor[batch.rows, side]] * length
                # What would be seen from the side or from behind is a wrong match, and its whole error is to count.
                far *= shown.seen[..., 2] > _AHEAD * np.linalg.norm(shown.seen, axis=-1)
                unsure[batch.rows, side] = moved * (np.sqrt(1 - 1 / np.sqrt(1 + far**2)) / length)[..., None]
        return unsure

    def _weigh(self, batch: Batch, side: int, error: Float64) -> Float64:
        """Errors [B, K, 2] or their derivatives [B, K, 2, p], with less of what a depth may be wrong by."""
        if self._unsure is None:
            return error
        v = self._unsure[batch.rows, side]
        if error.ndim == v.ndim:
            return np.asarray(error - v * (v * error).sum(axis=-1, keepdims=True))
        return np.asarray(error - v[..., None] * (v[..., None, :] @ error))

    def unit_variance(self, scene: Scene) -> float:
        """Variance of an unknown at the least of the loss, over its entry of the inverse of the normal matrix.

        For errors that are independent and alike in both directions, by the kernel's influence and its slope (Huber,
        Robust Statistics, 1981, section 7.6). Both residuals of a match have one error, which counts twice.
        """
        squared = (self._sizes(scene, weighed=True) / self.kernel) ** 2
        weight = np.repeat(self.problem.weight[:, None], 2, axis=1)

        def mean(values: Float64) -> float:
            return float((weight * values).sum() / weight.sum())

        influence = 0.5 * self.kernel**2 * float((weight**2 * squared / (1 + squared) ** 2).sum() / weight.sum())
        return 2 * influence * mean(1 / (1 + squared)) / mean(1 / (1 + squared) ** 2) ** 2

    def _focal_change(self, scene: Scene) -> Float64:
        return np.log(scene.focal_px[self.problem.camera_of_image] / self.problem.base_focal_px)

    def _project(self, scene: Scene, batch: Batch, side: int) -> _Projection:
        source = self.problem.pairs[batch.edges, side].astype(np.int64)
        target = self.problem.pairs[batch.edges, 1 - side].astype(np.int64)
        points = camera_points(self.problem, scene, batch.rows, source, side)
        turn = scene.cam_from_world[target, :, :3] @ scene.cam_from_world[source, :, :3].transpose(0, 2, 1)
        shift = scene.cam_from_world[target, :, 3:] - turn @ scene.cam_from_world[source, :, 3:]
        seen = points @ turn.transpose(0, 2, 1) + shift.transpose(0, 2, 1)
        depth = np.maximum(seen[..., 2], _MIN_DEPTH * np.linalg.norm(seen, axis=-1))
        focal = scene.focal_px[self.problem.camera_of_image[target]][:, None]
        pixel = focal[..., None] * seen[..., :2] / depth[..., None]
        residual = pixel - self.problem.pixels[batch.rows, 1 - side]
        return _Projection(
            points=points, turn=turn, seen=seen, depth=depth, focal=focal, pixel=pixel, residual=residual
        )

    def _linearise(self, scene: Scene, batch: Batch, side: int) -> tuple[EdgeBlock, DepthBlock]:
        shown = self._project(scene, batch, side)
        jacobian = self._jacobian(scene, batch, side, shown)
        residual = self._weigh(batch, side, shown.residual)
        # The error of a point behind the camera has no useful slope.
        weight = self.problem.weight[batch.rows] * batch.used * (shown.depth == shown.seen[..., 2])
        weight = weight / (1 + (residual**2).sum(axis=-1) / self.kernel**2)
        matrix, gradient = _sum_up(jacobian, residual, weight)
        columns = edge_columns(self.problem, batch, (side, 1 - side), focal=True)
        by_depth = weight[..., None] * jacobian[..., 6]  # an anchor's depth moves its points as the scale does
        return EdgeBlock(columns=columns, matrix=matrix, gradient=gradient), DepthBlock(
            anchors=self.problem.anchor[batch.rows, side],
            columns=columns,
            coupling=by_depth[..., :1] * jacobian[..., 0, :] + by_depth[..., 1:] * jacobian[..., 1, :],
            diagonal=(by_depth * jacobian[..., 6]).sum(axis=-1),
            gradient=(by_depth * residual).sum(axis=-1),
        )

    def _jacobian(self, scene: Scene, batch: Batch, side: int, shown: _Projection) -> Float64:
        """[B, K, 2, 15]: turn, shift and scale of the source, turn and shift of the target, then both focal lengths."""
        source = self.problem.pairs[batch.edges, side].astype(np.int64)
        across = self._weigh(batch, side, _by_point(shown))
        back = across @ shown.turn[:, None]
        jacobian = np.zeros((*shown.depth.shape, 2, 2 * PER_IMAGE + 1))
        jacobian[..., 0:3] = _cross(back, shown.points)
        jacobian[..., 3:6] = -back
        jacobian[..., 6] = (back @ shown.points[..., None])[..., 0]
        jacobian[..., 7:10] = -_cross(across, shown.seen)
        jacobian[..., 10:13] = across
        focal = scene.focal_px[self.problem.camera_of_image[source]]
        ratio = (self.problem.base_focal_px[source] / focal)[:, None]
        steep = (self.problem.offset[batch.rows, side] - 1.0) * ratio
        # Of the source's focal length: rays get steeper, and depth follows the angle of the surface.
        by_focal = -shown.points * (steep / np.maximum(1.0 + steep, LEAST_RELATIVE))[..., None]
        by_focal[..., :2] -= shown.points[..., :2]
        jacobian[..., 13] = (back @ by_focal[..., None])[..., 0]
        jacobian[..., 14] = self._weigh(batch, side, shown.pixel)
        return jacobian


@dataclass(frozen=True, kw_only=True)
class _Projection:
    points: Float64
    """[B, K, 3] in the source's frame."""
    turn: Float64
    """[B, 3, 3] target from source."""
    seen: Float64
    """[B, K, 3] in the target's frame."""
    depth: Float64
    """[B, K] positive."""
    focal: Float64
    """[B, 1] of the target."""
    pixel: Float64
    """[B, K, 2]."""
    residual: Float64
    """[B, K, 2]."""


def _by_point(shown: _Projection) -> Float64:
    """[B, K, 2, 3] change of the pixel with the point in the target's frame."""
    across = np.zeros((*shown.depth.shape, 2, 3))
    across[..., 0, 0] = across[..., 1, 1] = shown.focal / shown.depth
    across[..., 2] = -shown.pixel / shown.depth[..., None]
    return across


def _change_of_depth(problem: PointmapProblem) -> Float64:
    """[A] relative change of depth from pixel to pixel in an anchor's cell, by the spread of its matches."""
    anchor, count = problem.anchor.ravel(), len(problem.anchor_depth)
    value = np.log(np.maximum(problem.offset, LEAST_RELATIVE)).ravel()
    number = np.bincount(anchor, minlength=count)
    mean = np.bincount(anchor, value, count) / np.maximum(number, 1)
    variance = np.bincount(anchor, (value - mean[anchor]) ** 2, count) / np.maximum(number - 1, 1)
    return np.asarray(np.sqrt(variance) / _SPREAD_PX)


def move(problem: PointmapProblem, scene: Scene, step: Float64, depths: Float64) -> Scene:
    """The scene after a step of the unknowns [P] and of the depths [A]."""
    images = problem.num_images
    change = step[: PER_IMAGE * images].reshape(images, PER_IMAGE)
    turn = rotation_from_axis_angle(change[:, :3])
    pose = turn @ scene.cam_from_world
    pose[:, :, 3] += change[:, 3:6]
    return Scene(
        cam_from_world=pose,
        log_scale=scene.log_scale + change[:, 6],
        log_depth=scene.log_depth + depths,
        focal_px=scene.focal_px * np.exp(step[PER_IMAGE * images :]),
    )


def _cauchy(size: Float64, weight: Float64, kernel: float) -> float:
    value = 0.5 * kernel**2 * np.log1p((size / kernel) ** 2)
    return float((weight * value).sum() / max(float(weight.sum()), 1e-300))


def _by_source(problem: PointmapProblem) -> list[list[tuple[int, Batch]]]:
    """Sides and batches of all edges, both ways, in groups of source images: no anchor stands in two groups."""
    counts = np.diff(problem.start)
    matches = np.bincount(problem.pairs.ravel(), np.repeat(counts, 2), problem.num_images)
    group = (np.cumsum(matches) // GROUP_MATCHES).astype(np.int64)
    groups = []
    for number in np.unique(group):
        sides = [(side, np.flatnonzero(group[problem.pairs[:, side]] == number)) for side in (0, 1)]
        groups.append([(side, batch) for side, edges in sides for batch in make_batches(problem.start, edges)])
    return [one for one in groups if one]


def _sum_up(jacobian: Float64, residual: Float64, weight: Float64) -> tuple[Float64, Float64]:
    """Σ w JᵀJ [B, k, k] and Σ w Jᵀr [B, k] over the matches of each edge."""
    edges, matches, rows, unknowns = jacobian.shape
    flat = jacobian.reshape(edges, matches * rows, unknowns)
    weighted = (weight[..., None, None] * jacobian).reshape(edges, matches * rows, unknowns).transpose(0, 2, 1)
    return weighted @ flat, (weighted @ residual.reshape(edges, matches * rows, 1))[..., 0]


def _cross(left: Float64, right: Float64) -> Float64:
    """Rows of left [..., r, 3] × right [..., 3]."""
    result = np.empty_like(left)
    x, y, z = (right[..., None, axis] for axis in range(3))
    result[..., 0] = left[..., 1] * z - left[..., 2] * y
    result[..., 1] = left[..., 2] * x - left[..., 0] * z
    result[..., 2] = left[..., 0] * y - left[..., 1] * x
    return result
