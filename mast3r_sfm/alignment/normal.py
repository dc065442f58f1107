"""Normal equations of the alignment: dense blocks of edges, and depths that each stand in their own equation.

The unknowns are seven per image (a turn and a shift of its camera frame, the logarithm of its scale), the logarithm of
the focal length per camera, and the logarithm of the depth of every anchor. Depths are far more than all others
together but touch no other depth, so they are eliminated (Schur complement). The product of the reduced matrix with a
vector needs only the edges' blocks, and conjugate gradients need only such products (Agarwal et al., Bundle adjustment
in the large, ECCV 2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import LinearOperator, cg

from mast3r_sfm.types import Bool, Float64, Int64

PER_IMAGE = 7
CG_TOLERANCE = 1e-3
CG_STEPS = 200
_TINY = 1e-300


@dataclass(frozen=True, kw_only=True)
class EdgeBlock:
    """The share of B edges with K matches and k unknowns each; its residuals have been summed over the matches."""

    columns: Int64
    """[B, k] numbers of the unknowns."""
    matrix: Float64
    """[B, k, k]."""
    gradient: Float64
    """[B, k]."""
    anchors: Int64
    """[B, K] the anchor whose depth a match depends on; [B, 0] where depths are not solved for."""
    coupling: Float64
    """[B, K, k] between that depth and the unknowns; zero where a match is a repeated one."""


@dataclass(frozen=True, kw_only=True)
class DepthBlock:
    """The equations of the depths by themselves."""

    diagonal: Float64
    """[A] positive; [0] where depths are not solved for."""
    gradient: Float64


@dataclass(frozen=True, kw_only=True)
class NormalEquations:
    """H x = −g over P unknowns, of which only the free ones move, and A depths."""

    blocks: Sequence[EdgeBlock]
    depths: DepthBlock
    prior: Float64
    """[P] added to the diagonal."""
    prior_gradient: Float64
    """[P]."""
    free: Bool
    """[P]."""

    def solve(self, damping: float) -> tuple[Float64, Float64]:
        """The step for the unknowns [P] and the depths [A], with the diagonal increased by `damping` times itself."""
        matrix = self._matrix(damping)
        diagonal = self.depths.diagonal * (1 + damping)
        gradient = self._gather([block.gradient for block in self.blocks]) + self.prior_gradient
        step = self._conjugate_gradients(
            matrix, diagonal, self._to_unknowns(self.depths.gradient / diagonal) - gradient
        )
        return step, -(self.depths.gradient + self._to_depths(step)) / diagonal

    def _gather(self, values: Sequence[Float64]) -> Float64:
        """Sum of values [B, k] of all blocks by unknown: [P]."""
        total = np.zeros(len(self.prior))
        for block, value in zip(self.blocks, values, strict=True):
            total += np.bincount(block.columns.ravel(), value.ravel(), len(total))
        return total

    def _matrix(self, damping: float) -> scipy.sparse.csr_array:
        """[P, P] the part without the depths."""
        size = len(self.prior)
        rows, columns, values = [np.arange(size)], [np.arange(size)], [self.prior]
        for block in self.blocks:
            k = block.columns.shape[1]
            rows.append(np.repeat(block.columns, k, axis=1).ravel())
            columns.append(np.tile(block.columns, (1, k)).ravel())
            values.append(block.matrix.ravel())
        table = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
        matrix = scipy.sparse.coo_array(table, shape=(size, size)).tocsr()
        matrix.setdiag((1 + damping) * matrix.diagonal())
        return matrix

    def _to_depths(self, unknowns: Float64) -> Float64:
        """Coupling times unknowns [P]: [A]."""
        total = np.zeros(len(self.depths.diagonal))
        for block in self.blocks:
            value = (block.coupling @ unknowns[block.columns][..., None])[..., 0]
            total += np.bincount(block.anchors.ravel(), value.ravel(), len(total))
        return total

    def _to_unknowns(self, depths: Float64) -> Float64:
        """Transposed coupling times depths [A]: [P]."""
        return self._gather([(depths[block.anchors][:, None] @ block.coupling)[:, 0] for block in self.blocks])

    def _likeness(self, matrix: scipy.sparse.csr_array, diagonal: Float64) -> scipy.sparse.csr_array:
        """The matrix with less on its diagonal, as elimination will take about as much as each match would alone."""
        taken = [(block.coupling**2 / diagonal[block.anchors][..., None]).sum(axis=1) for block in self.blocks]
        whole = matrix.diagonal()
        likeness = matrix.copy()
        likeness.setdiag(np.maximum(whole - self._gather(taken), 0.05 * whole))
        return likeness

    def _conjugate_gradients(self, matrix: scipy.sparse.csr_array, diagonal: Float64, right: Float64) -> Float64:
        free = np.flatnonzero(self.free)
        full = np.zeros(len(self.prior))

        def product(vector: Float64) -> Float64:
            full[free] = vector
            return np.asarray((matrix @ full - self._to_unknowns(self._to_depths(full) / diagonal))[free])

        precondition = _block_inverse(self._likeness(matrix, diagonal), free)
        size = (len(free), len(free))
        solution, _ = cg(
            LinearOperator(size, matvec=product, dtype=np.float64),
            right[free],
            rtol=CG_TOLERANCE,
            maxiter=CG_STEPS,
            M=LinearOperator(size, matvec=precondition.dot, dtype=np.float64),
        )
        step = np.zeros(len(self.prior))
        step[free] = solution
        return step


def _block_inverse(matrix: scipy.sparse.csr_array, free: Int64) -> scipy.sparse.csr_array:
    """Inverse of the blocks of each image, and of the diagonal elsewhere: [free, free]."""
    size = matrix.shape[0]
    owner = np.arange(size) // PER_IMAGE
    table = matrix.tocoo()
    rows, columns = table.coords
    inside = owner[rows] == owner[columns]
    blocks = np.zeros((int(owner[-1]) + 1, PER_IMAGE, PER_IMAGE))
    np.add.at(blocks, (owner[rows[inside]], rows[inside] % PER_IMAGE, columns[inside] % PER_IMAGE), table.data[inside])
    is_free = np.zeros(len(blocks) * PER_IMAGE, bool)
    is_free[free] = True
    held = ~is_free.reshape(-1, PER_IMAGE)
    blocks[held[:, :, None] | held[:, None, :]] = 0.0
    blocks[np.broadcast_to(np.eye(PER_IMAGE, dtype=bool), blocks.shape) & held[:, :, None]] = 1.0
    scale = np.sqrt(np.maximum(np.diagonal(blocks, axis1=1, axis2=2), _TINY))
    normed = blocks / (scale[:, :, None] * scale[:, None, :]) + 1e-9 * np.eye(PER_IMAGE)
    inverse = np.linalg.inv(normed) / (scale[:, :, None] * scale[:, None, :])
    count, side, _ = inverse.shape
    whole = scipy.sparse.bsr_array(
        (inverse, np.arange(count), np.arange(count + 1)), shape=(count * side, count * side)
    )
    return scipy.sparse.csr_array(whole.tocsr())[free][:, free]
