"""Normal equations of the alignment: dense blocks of edges, and depths that each stand in their own equation.

The unknowns are seven per image (a turn and a shift of its camera frame, the logarithm of its scale), the logarithm of
the focal length per camera, and the logarithm of the depth of every anchor. Depths are far more than all others
together but touch no other depth, so they are eliminated first (Schur complement; Triggs et al., Bundle adjustment, a
modern synthesis, 2000, section 6).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
from scipy.sparse.linalg import splu

from mast3r_sfm.alignment.problem import Batch, PointmapProblem
from mast3r_sfm.types import Bool, Float64, Int32, Int64

PER_IMAGE = 7
DENSE = 3000
"""Unknowns up to which a dense factorisation is the faster one: then most images share points with most others."""
FILLED = 4
"""Equations of depths are kept as a dense matrix where one entry in so many or more is not zero."""
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
class DepthBlock:
    """What B edges with K matches and k unknowns each say of the depths of anchors."""

    anchors: Int64
    """[B, K]."""
    columns: Int64
    """[B, k] numbers of the unknowns."""
    coupling: Float64
    """[B, K, k] between depths and unknowns; zero where a match is a repeated one, as below."""
    diagonal: Float64
    """[B, K]."""
    gradient: Float64
    """[B, K]."""


@dataclass(frozen=True, kw_only=True)
class Depths:
    """The equations of some anchors, which no other ones share."""

    anchors: Int64
    """[a]."""
    coupling: Float64 | scipy.sparse.csr_array
    """[a, P], dense where that is the faster way."""
    diagonal: Float64
    """[a] positive."""
    gradient: Float64
    """[a]."""


class _Entries(NamedTuple):
    """Entries of a matrix that add up where they stand in one place."""

    rows: Int32
    columns: Int32
    values: Float64
    shape: tuple[int, int]

    def summed(self) -> Float64 | scipy.sparse.csr_array:
        """The matrix, dense where one place in FILLED or more has an entry."""
        height, width = self.shape
        if len(self.values) * FILLED > height * width:
            place = self.rows.astype(np.int64) * width + self.columns
            return np.asarray(np.bincount(place, self.values, height * width).reshape(self.shape))
        return scipy.sparse.coo_array((self.values, (self.rows, self.columns)), shape=self.shape).tocsr()


def sum_depths(blocks: Sequence[DepthBlock], unknowns: int, prior: float, value: Float64) -> Depths:
    """Put together what the edges say of anchors.

    Args:
        blocks: all that touch these anchors.
        unknowns: P.
        prior: added to each diagonal.
        value: [A] deviation of every anchor from its prior.
    """
    named, where = np.unique(np.concatenate([block.anchors.ravel() for block in blocks]), return_inverse=True)
    rows, columns, values, start = [], [], [], 0
    for block in blocks:
        edges, matches, k = block.coupling.shape
        # Half the memory of the default integers, at what takes most of it.
        rows.append(np.repeat(where[start : start + edges * matches].astype(np.int32), k))
        columns.append(np.broadcast_to(block.columns.astype(np.int32)[:, None], block.coupling.shape).ravel())
        values.append(block.coupling.ravel())
        start += edges * matches
    entries = _Entries(np.concatenate(rows), np.concatenate(columns), np.concatenate(values), (len(named), unknowns))
    diagonal: Float64 = np.concatenate([block.diagonal.ravel() for block in blocks])
    gradient: Float64 = np.concatenate([block.gradient.ravel() for block in blocks])
    return Depths(
        anchors=named,
        coupling=entries.summed(),
        diagonal=np.asarray(prior + np.bincount(where, diagonal, len(named)), np.float64),
        gradient=prior * value[named] + np.bincount(where, gradient, len(named)),
    )


@dataclass(frozen=True, kw_only=True)
class NormalEquations:
    """H x = −g over P unknowns, of which only the free ones move, and over the depths of A anchors."""

    matrix: scipy.sparse.csr_array
    """[P, P] without the depths."""
    gradient: Float64
    """[P]."""
    depths: Sequence[Depths]
    """Each anchor in one of them at most; the others stay."""
    num_anchors: int
    free: Bool
    """[P]."""

    def solve(self, damping: float) -> tuple[Float64, Float64]:
        """The step for the unknowns [P] and the depths [A], with the diagonal increased by `damping` times itself.

        Raises:
            ArithmeticError: the equations cannot be solved; more damping may help.
        """
        right = -self.gradient
        for depths in self.depths:
            right += depths.coupling.T @ (depths.gradient / ((1 + damping) * depths.diagonal))
        step = np.zeros(len(right))
        matrix, free = self.reduced(damping)
        step[free] = _solve_scaled(matrix, right[free])
        change = np.zeros(self.num_anchors)
        for depths in self.depths:
            change[depths.anchors] = -(depths.gradient + depths.coupling @ step) / ((1 + damping) * depths.diagonal)
        return step, change

    def reduced(self, damping: float) -> tuple[Float64 | scipy.sparse.csr_array, Int64]:
        """Matrix [F, F] of the free unknowns without the depths, dense for few unknowns, and their numbers [F]."""
        free = np.flatnonzero(self.free)
        matrix = self.matrix + scipy.sparse.diags_array(damping * self.matrix.diagonal())
        dense = matrix.toarray() if len(free) <= DENSE else None
        for depths in self.depths:
            scale = 1 / np.sqrt((1 + damping) * depths.diagonal)
            if isinstance(depths.coupling, np.ndarray):
                scaled = scale[:, None] * depths.coupling
            else:
                scaled = scipy.sparse.diags_array(scale) @ depths.coupling
            share = scaled.T @ scaled
            if dense is None:
                matrix = matrix - scipy.sparse.csr_array(share)
            else:
                # An array from the start: sorting what a sparse matrix is made of takes longer than making it.
                dense -= share if isinstance(share, np.ndarray) else share.toarray()
        return scipy.sparse.csr_array(matrix)[free][:, free] if dense is None else dense[np.ix_(free, free)], free


def sum_edges(blocks: Iterable[EdgeBlock], unknowns: int) -> tuple[scipy.sparse.csr_array, Float64]:
    """Matrix [P, P] and gradient [P] of all edges."""
    rows, columns, values, gradient = [], [], [], np.zeros(unknowns)
    for block in blocks:
        k = block.columns.shape[1]
        rows.append(np.repeat(block.columns, k, axis=1).ravel())
        columns.append(np.tile(block.columns, (1, k)).ravel())
        values.append(block.matrix.ravel())
        gradient += np.bincount(block.columns.ravel(), block.gradient.ravel(), unknowns)
    table = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return scipy.sparse.coo_array(table, shape=(unknowns, unknowns)).tocsr(), gradient


def _solve_scaled(matrix: Float64 | scipy.sparse.csr_array, right: Float64) -> Float64:
    """Solve with rows and columns scaled to a diagonal of 1, since the unknowns have different units."""
    scale = 1 / np.sqrt(np.maximum(matrix.diagonal(), _TINY))
    try:
        if isinstance(matrix, np.ndarray):
            dense = matrix * scale[:, None] * scale
            solution = scipy.linalg.solve(dense, scale * right, assume_a="pos", check_finite=False)
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
