"""Normal equations of the alignment: dense blocks of edges, and depths that each stand in their own equation.

The unknowns are seven per image (a turn and a shift of its camera frame, the logarithm of its scale), the logarithm of
the focal length per camera, and the logarithm of the depth of every anchor. Depths are far more than all others
together but touch no other depth, so they are eliminated first (Schur complement; Triggs et al., Bundle adjustment, a
modern synthesis, 2000, section 6).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy.linalg
import scipy.sparse
from scipy.sparse.linalg import splu

from mast3r_sfm.alignment.problem import Batch, PointmapProblem
from mast3r_sfm.types import Bool, Float64, Int64

Matrix: TypeAlias = Float64 | scipy.sparse.csr_array

PER_IMAGE = 7
DENSE = 3000
"""Unknowns up to which dense matrices are the faster ones: then most images share points with most others."""
_TINY = 1e-300


@dataclass(frozen=True, kw_only=True)
class EdgeBlock:
    """The share of B edges with k unknowns each; their residuals have been summed over the matches."""

    columns: Int64
    """[B, k] numbers of the unknowns."""
    matrix: Float64
    """[B, k, k]."""
    gradient: Float64
    """[B, k]."""


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """How the depths that B directed edges with K matches each see depend on l local unknowns of the edge."""

    where: Int64
    """[B, K] number of the depth."""
    columns: Int64
    """[B, k] numbers of the unknowns."""
    chain: Float64
    """[B, l, k] change of the local unknowns with the unknowns."""
    values: Float64
    """[B, K, l], over the root of the diagonal of the depth's equation; zero where a match is a repeated one."""


@dataclass(frozen=True, kw_only=True)
class Depths:
    """The equations of all depths, and what eliminating them without damping takes from the others."""

    anchors: Int64
    """[D] number of the anchor of each."""
    root: Float64
    """[D] of the diagonal."""
    gradient: Float64
    """[D] over that root."""
    couplings: Sequence[Coupling]
    matrix: Matrix
    """[P, P] to be taken from that of the unknowns."""
    right: Float64
    """[P] to be added to their right side."""

    def change(self, step: Float64) -> Float64:
        """[D] by which the depths change, without damping, where the unknowns [P] take a step."""
        total = self.gradient.copy()
        for one in self.couplings:
            local = one.chain @ step[one.columns][..., None]
            total += np.bincount(one.where.ravel(), (one.values @ local).ravel(), len(total))
        return -total / self.root


@dataclass(frozen=True, kw_only=True)
class NormalEquations:
    """H x = −g over P unknowns, of which only the free ones move, and over the depths of A anchors."""

    matrix: Matrix
    """[P, P] without the depths; dense for few unknowns."""
    gradient: Float64
    """[P]."""
    depths: Depths | None
    """Anchors that are not in it stay."""
    num_anchors: int
    free: Bool
    """[P]."""

    def solve(self, damping: float) -> tuple[Float64, Float64]:
        """The step for the unknowns [P] and the depths [A], with the diagonal increased by `damping` times itself.

        Raises:
            ArithmeticError: the equations cannot be solved; more damping may help.
        """
        right = -self.gradient
        if self.depths is not None:
            right += self.depths.right / (1 + damping)
        step, change = np.zeros(len(right)), np.zeros(self.num_anchors)
        matrix, free = self.reduced(damping)
        step[free] = _solve_scaled(matrix, right[free])
        if self.depths is not None:
            change[self.depths.anchors] = self.depths.change(step) / (1 + damping)
        return step, change

    def reduced(self, damping: float) -> tuple[Matrix, Int64]:
        """Matrix [F, F] of the free unknowns without the depths, dense for few unknowns, and their numbers [F]."""
        free = np.flatnonzero(self.free)
        matrix = _with_diagonal(self.matrix, damping * self.matrix.diagonal())
        if self.depths is not None:
            matrix = add_matrices(matrix, -self.depths.matrix / (1 + damping))
        if isinstance(matrix, np.ndarray):
            return matrix[np.ix_(free, free)], free
        matrix = scipy.sparse.csr_array(matrix)[free][:, free]
        return matrix.toarray() if len(free) <= DENSE else matrix, free


def sum_edges(blocks: Iterable[EdgeBlock], unknowns: int, diagonal: Float64 | float = 0.0) -> tuple[Matrix, Float64]:
    """Matrix [P, P], with something added to its diagonal [P], and gradient [P] of all edges."""
    given = list(blocks)
    columns = np.concatenate([block.columns for block in given])
    matrix = sum_blocks(columns, columns, np.concatenate([block.matrix for block in given]), unknowns)
    gradient = np.concatenate([block.gradient for block in given])
    added = np.broadcast_to(np.asarray(diagonal, np.float64), (unknowns,))
    return _with_diagonal(matrix, added), sum_vectors(columns, gradient, unknowns)


def sum_vectors(columns: Int64, vectors: Float64, unknowns: int) -> Float64:
    """[P] sum of n vectors [n, k] that stand in columns [n, k]."""
    return np.asarray(np.bincount(columns.ravel(), vectors.ravel(), unknowns), np.float64)


def add_matrices(left: Matrix, right: Any) -> Matrix:
    """Sum of two matrices [P, P], both dense or both sparse ones of any kind."""
    total: Any = left + right
    return total if isinstance(total, np.ndarray) else scipy.sparse.csr_array(total)


def sum_blocks(rows: Int64, columns: Int64, blocks: Float64, unknowns: int) -> Matrix:
    """[P, P] sum of n blocks [n, k, k] that stand in rows [n, k] and columns [n, k]."""
    if unknowns <= DENSE:
        place = unknowns * rows[:, :, None] + columns[:, None]
        summed = np.bincount(place.ravel(), blocks.ravel(), unknowns * unknowns)
        return np.asarray(summed.reshape(unknowns, unknowns))
    where = [np.broadcast_to(one, blocks.shape).ravel() for one in (rows[:, :, None], columns[:, None])]
    table = (blocks.ravel(), tuple(one.astype(np.int32) for one in where))
    return scipy.sparse.coo_array(table, shape=(unknowns, unknowns)).tocsr()


def _with_diagonal(matrix: Matrix, added: Float64) -> Matrix:
    if isinstance(matrix, np.ndarray):
        result = matrix.copy()
        result[np.diag_indices(len(result))] += added
        return result
    return scipy.sparse.csr_array(matrix + scipy.sparse.diags_array(added))


def _solve_scaled(matrix: Matrix, right: Float64) -> Float64:
    """Solve with rows and columns scaled to a diagonal of 1, since the unknowns have different units."""
    scale = 1 / np.sqrt(np.maximum(matrix.diagonal(), _TINY))
    try:
        if isinstance(matrix, np.ndarray):
            dense: Float64 = matrix * scale[:, None] * scale
            solution: Float64 = scipy.linalg.solve(dense, scale * right, assume_a="pos", check_finite=False)
        else:
            diagonal = scipy.sparse.diags_array(scale)
            scaled = scipy.sparse.csc_array(diagonal @ matrix @ diagonal)
            # Symmetric and positive: rows need not be exchanged, which keeps the factors as sparse as they can be.
            factors = splu(scaled, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
            solution = factors.solve(scale * right)
    except (np.linalg.LinAlgError, RuntimeError) as singular:
        raise ArithmeticError(f"the normal equations are singular: {singular}") from singular
    return np.asarray(scale * solution, np.float64)


def edge_columns(problem: PointmapProblem, batch: Batch, sides: Sequence[int], focal: bool = False) -> Int64:
    """Unknowns of both images of the batch's edges: pose and scale of one and of the other [B, 14].

    With the focal lengths, [B, 15]: the second scale is left out, and those of both images come last.
    """
    images = problem.pairs[batch.edges][:, list(sides)].astype(np.int64)
    columns = (PER_IMAGE * images[:, :, None] + np.arange(PER_IMAGE)).reshape(len(images), -1)
    if not focal:
        return columns
    cameras = PER_IMAGE * problem.num_images + problem.camera_of_image[images].astype(np.int64)
    return np.concatenate([columns[:, :-1], cameras], axis=1)
