"""Rotation averaging: one rotation per image that agrees with most edges.

Edges are first judged by the triangles they stand in (Zach et al., CVPR 2010), a spanning tree of the trusted ones
starts the solution, and iteratively re-weighted least squares over all edges, first L1 then Geman–McClure, finishes it
(Chatterjee & Govindu, ICCV 2013).
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import splu
from scipy.spatial.transform import Rotation

from mast3r_sfm.alignment.edges import EdgeSet, spanning_tree
from mast3r_sfm.geometry.rigid import angle_between_rotations
from mast3r_sfm.types import Float64, Int64

MAX_TRIANGLE_ERROR = np.radians(5.0)
UNTESTED_TRUST = 0.3
"""Trust in an edge that stands in no triangle, between that of a refuted and of a confirmed one."""
L1_STEPS, ROBUST_STEPS = 10, 30
ROBUST_SCALE = np.radians(3.0)
CONVERGED = 1e-8


def trust_by_triangles(edges: EdgeSet) -> Float64:
    """How far the triangles confirm each edge: [E] in (0, 1]; wrong edges rarely close with right ones."""
    agree, total = np.zeros(len(edges.pairs)), np.zeros(len(edges.pairs))
    sides = _triangles(edges)
    if len(sides):
        # i→j, then j→k, against i→k.
        around = edges.rotation[sides[:, 1]] @ edges.rotation[sides[:, 0]]
        closes = angle_between_rotations(around, edges.rotation[sides[:, 2]]) < MAX_TRIANGLE_ERROR
        for side in sides.T:
            np.add.at(total, side, 1.0)
            np.add.at(agree, side, closes.astype(np.float64))
    # One good triangle is strong evidence, since chance rarely closes one; bad ones may all be another edge's fault.
    return np.where(total == 0, UNTESTED_TRUST, (agree + 0.02) / (0.5 * agree + 0.5 * total + 0.02))


def _triangles(edges: EdgeSet) -> Int64:
    """[T, 3] edge numbers (i-j, j-k, i-k) of all triangles i < j < k."""
    count = edges.num_images
    number = scipy.sparse.csr_array(
        (np.arange(1, len(edges.pairs) + 1), (edges.pairs[:, 0], edges.pairs[:, 1])), shape=(count, count)
    )
    found = []
    for side, (i, j) in enumerate(edges.pairs):
        row_i, row_j = number[[int(i)]].tocoo(), number[[int(j)]].tocoo()
        _, at_i, at_j = np.intersect1d(row_i.coords[1], row_j.coords[1], return_indices=True)
        third = np.full(len(at_i), side)
        found.append(np.stack([third, row_j.data[at_j] - 1, row_i.data[at_i] - 1], axis=1))
    return np.concatenate(found) if found else np.zeros((0, 3), np.int64)


def average_rotations(edges: EdgeSet) -> tuple[Float64, Float64]:
    """World-to-camera rotations [n, 3, 3] and each edge's disagreement with them [E], in radians.

    Args:
        edges: a connected set, weighted by the trust in each.
    """
    rotations = np.tile(np.eye(3), (edges.num_images, 1, 1))
    tree = spanning_tree(edges)
    for parent, child, edge in tree:
        forward = edges.pairs[edge, 0] == parent
        step = edges.rotation[edge] if forward else edges.rotation[edge].T
        rotations[child] = step @ rotations[parent]
    strength = np.sqrt(edges.weight / edges.weight.max())
    for step_number in range(L1_STEPS + ROBUST_STEPS):
        residual = _residual(edges, rotations)
        size = np.linalg.norm(residual, axis=1)
        if step_number < L1_STEPS:
            weight = strength / np.maximum(size, 1e-4)
        else:
            weight = strength * (ROBUST_SCALE**2 / (ROBUST_SCALE**2 + size**2)) ** 2
        change = _solve(edges, weight, residual)
        rotations = rotations @ Rotation.from_rotvec(change).as_matrix()
        if step_number >= L1_STEPS and np.abs(change).max() < CONVERGED:
            break
    return rotations, np.linalg.norm(_residual(edges, rotations), axis=1)


def _residual(edges: EdgeSet, rotations: Float64) -> Float64:
    """Rotation vectors [E, 3] in the world frame, by which each edge misses the difference of its two images."""
    first, second = rotations[edges.pairs[:, 0]], rotations[edges.pairs[:, 1]]
    loop = second.transpose(0, 2, 1) @ edges.rotation @ first
    vectors: Float64 = Rotation.from_matrix(loop).as_rotvec()
    return vectors


def _solve(edges: EdgeSet, weight: Float64, residual: Float64) -> Float64:
    """Weighted least squares of x_j - x_i = residual over the graph: [n, 3], mean free of image 0."""
    laplacian = graph_laplacian(edges, weight)
    right = np.zeros((edges.num_images, 3))
    np.add.at(right, edges.pairs[:, 1], weight[:, None] * residual)
    np.add.at(right, edges.pairs[:, 0], -weight[:, None] * residual)
    change = np.zeros((edges.num_images, 3))
    if edges.num_images > 1:
        change[1:] = splu(laplacian[1:, 1:].tocsc()).solve(right[1:])
    return change


def graph_laplacian(edges: EdgeSet, weight: Float64) -> scipy.sparse.csr_array:
    """Σ w (e_j − e_i)(e_j − e_i)ᵀ over the edges, [n, n], kept invertible where all weights of an image vanish."""
    i, j = edges.pairs[:, 0], edges.pairs[:, 1]
    weight = np.maximum(weight, 1e-9 * float(weight.max()))
    rows, columns = np.concatenate([i, j, i, j]), np.concatenate([i, j, j, i])
    values = np.concatenate([weight, weight, -weight, -weight])
    return scipy.sparse.coo_array((values, (rows, columns)), shape=(edges.num_images,) * 2).tocsr()
