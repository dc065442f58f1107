"""The coarse loss of the alignment of pointmaps, and its linearisation.

Where do both images of an edge put the same point in the world, relative to its depth? Summed over the matches by their
confidence, through a kernel of logarithmic growth (Cauchy): w · γ²/2 · log(1 + (r/γ)²). Measured relative to depth, the
loss does not change with the scale of the world, and cannot be made small by shrinking it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mast3r_sfm.alignment.normal import PER_IMAGE, EdgeBlock, NormalEquations, edge_columns, sum_edges
from mast3r_sfm.alignment.problem import Batch, PointmapProblem, Scene, camera_points, make_batches
from mast3r_sfm.types import Bool, Float64

_EPSILON = np.zeros((3, 3, 3))
"""The sign of a permutation: (a × b)_j = Σ ε_jmn a_m b_n."""
_EPSILON[[0, 1, 2], [1, 2, 0], [2, 0, 1]] = 1.0
_EPSILON[[0, 1, 2], [2, 0, 1], [1, 2, 0]] = -1.0


class CoarseLoss:
    """Distance of matched points in the world over their mean depth; moves poses and scales.

    Depths and focal lengths stay, so that a match is a row z = (1, first point, second point) of its canonical views,
    and its error is linear in z. Once the kernel has given the matches of an edge their weights, all that they say is
    in Σ w z zᵀ.
    """

    def __init__(self, problem: PointmapProblem, kernel: float) -> None:
        self.problem = problem
        self.kernel = kernel
        self._batches = make_batches(problem.start)
        self._weights = [problem.weight[batch.rows] * batch.used for batch in self._batches]
        self._matches: tuple[Scene, list[Float64]] | None = None

    def residuals(self, scene: Scene) -> Float64:
        """[M] distances over depth."""
        size = np.zeros(len(self.problem.weight))
        for batch, rows in zip(self._batches, self._rows(scene), strict=True):
            size[batch.rows] = np.sqrt(_squared(rows @ self._map(scene, batch)))
        return size

    def value(self, scene: Scene) -> float:
        """Mean over the matches."""
        total = 0.0
        for batch, rows, weight in zip(self._batches, self._rows(scene), self._weights, strict=True):
            squared = _squared(rows @ self._map(scene, batch))
            total += float((weight * np.log1p(squared / self.kernel**2)).sum())
        return 0.5 * self.kernel**2 * total / max(float(self.problem.weight.sum()), 1e-300)

    def linearise(self, scene: Scene, fixed: Bool) -> NormalEquations:
        """Normal equations of one step; unknowns that are `fixed` [P] stay, and so do focal lengths."""
        count = PER_IMAGE * self.problem.num_images + self.problem.num_cameras
        free = ~fixed
        free[PER_IMAGE * self.problem.num_images :] = False
        given = zip(self._batches, self._rows(scene), self._weights, strict=True)
        matrix, gradient = sum_edges((self._linearise(scene, *one) for one in given), count)
        anchors = len(scene.log_depth)
        return NormalEquations(matrix=matrix, gradient=gradient, depths=None, num_anchors=anchors, free=free)

    def _rows(self, scene: Scene) -> list[Float64]:
        """[B, K, 7] of every batch, kept from scene to scene while depths and focal lengths stay."""
        if self._matches is not None:
            before, rows = self._matches
            if np.array_equal(before.log_depth, scene.log_depth) and np.array_equal(before.focal_px, scene.focal_px):
                return rows
        still = replace(scene, log_scale=np.zeros_like(scene.log_scale))
        rows = []
        for batch in self._batches:
            points = [
                camera_points(self.problem, still, batch.rows, self.problem.pairs[batch.edges, side], side)
                for side in (0, 1)
            ]
            rows.append(np.concatenate([np.ones((*batch.rows.shape, 1)), *points], axis=-1))
        self._matches = scene, rows
        return rows

    def _map(self, scene: Scene, batch: Batch) -> Float64:
        """[B, 7, 4] by which a row becomes its error in the world and its mean depth."""
        mapped = np.zeros((len(batch.edges), 7, 4))
        for side, sign in ((0, 1.0), (1, -1.0)):
            images, at = self.problem.pairs[batch.edges, side], 1 + 3 * side
            pose, scale = scene.cam_from_world[images], np.exp(scene.log_scale[images])
            mapped[:, at : at + 3, :3] = sign * scale[:, None, None] * pose[:, :, :3]
            mapped[:, 0, :3] -= sign * (pose[:, None, :, 3] @ pose[:, :, :3])[:, 0]
            mapped[:, at + 2, 3] = 0.5 * scale
        return mapped

    def _linearise(self, scene: Scene, batch: Batch, rows: Float64, weight: Float64) -> EdgeBlock:
        mapped = self._map(scene, batch)
        error = rows @ mapped
        weight = weight / ((1 + _squared(error) / self.kernel**2) * error[..., 3] ** 2)
        moments = rows.transpose(0, 2, 1) @ (weight[..., None] * rows)  # [B, 7, 7]
        change = np.zeros((len(batch.edges), 2 * PER_IMAGE, 7, 3))
        for side, sign in ((0, 1.0), (1, -1.0)):
            images, k, at = self.problem.pairs[batch.edges, side], PER_IMAGE * side, 1 + 3 * side
            turn, scaled = scene.cam_from_world[images, :, :3], mapped[:, at : at + 3, :3]
            # World = Rᵀ (x − t): a turn ω of the camera frame moves it by Rᵀ (ω × x)'s opposite, a shift v by −Rᵀ v.
            change[:, k : k + 3, at : at + 3] = np.einsum("jmn,bmr->bjnr", _EPSILON, scaled)
            change[:, k + 3 : k + 6, 0] = -sign * turn
            change[:, k + 6, at : at + 3] = scaled
        flat = change.reshape(len(change), 2 * PER_IMAGE, 21)
        weighted = (moments[:, None] @ change).reshape(flat.shape)
        gradient = flat @ (moments @ mapped[..., :3]).reshape(-1, 21, 1)
        return EdgeBlock(
            columns=edge_columns(self.problem, batch, (0, 1)),
            matrix=flat @ weighted.transpose(0, 2, 1),
            gradient=gradient[..., 0],
        )


def _squared(error: Float64) -> Float64:
    """[B, K] squared distances over depth, of errors and depths [B, K, 4]."""
    x, y, z, depth = np.moveaxis(error, -1, 0)
    return np.asarray((x * x + y * y + z * z) / (depth * depth))
