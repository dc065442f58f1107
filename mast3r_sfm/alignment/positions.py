"""Scales of the edges and positions of the cameras, once all rotations are known.

Every pair has its own scale. Where two edges share an image, the points that both see from it have two depths, whose
ratio is the ratio of the scales; averaging these ratios over the whole graph gives all scales. Each edge is then a
known vector between two camera centres, and the centres follow by robust least squares over all edges, not only a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import splu

from mast3r_sfm.alignment.edges import EdgeSet, components, spanning_tree
from mast3r_sfm.errors import DivergedError
from mast3r_sfm.types import Float64, Int32, PairMatches

MIN_SHARED_POINTS = 8
RATIO_NOISE = 0.02
"""Relative error below which no ratio of depths is trusted further."""
STEPS = 30
ROBUST_SCALES = (0.6, 0.3, 0.15)
"""Relative error of a baseline at which an edge loses most of its weight; smaller as the solution gets better."""
RELIABLE_ANGLE = np.radians(3.0)
L1_FLOOR = 1e-3
CONVERGED = 1e-7


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Pairs of edges that share an image and points of it: log(scale of b) − log(scale of a) = log_ratio."""

    edges: Int32
    """[Q, 2] edge numbers a, b."""
    log_ratio: Float64
    weight: Float64


def depth_ratios(matches: Sequence[PairMatches]) -> Ratios:
    """Compare the depths of the keypoints that edges share, image by image."""
    incident: dict[int, list[tuple[int, Float64, Float64]]] = {}
    for edge, match in enumerate(matches):
        incident.setdefault(match.first, []).append((edge, match.xy_first, match.points_first[:, 2]))
        incident.setdefault(match.second, []).append((edge, match.xy_second, match.points_second[:, 2]))
    rows = [row for sides in incident.values() for row in ratios_of_image(sides)]
    table = np.array(rows, np.float64).reshape(-1, 4)
    return Ratios(edges=table[:, :2].astype(np.int32), log_ratio=table[:, 2], weight=table[:, 3])


def ratios_of_image(sides: list[tuple[int, Float64, Float64]]) -> list[tuple[float, float, float, float]]:
    """Compare the depths that edges give the same places of one image.

    Args:
        sides: edge, places [M, k] and depths [M], positive, of each.

    Returns:
        Rows of `Ratios`: edge, edge, logarithm of the ratio, weight.
    """
    keypoint = np.unique(np.concatenate([xy for _, xy, _ in sides]), axis=0, return_inverse=True)[1].ravel()
    log_depth = np.full((len(sides), int(keypoint.max(initial=-1)) + 1), np.nan)
    start = 0
    for row, (_, xy, depth) in enumerate(sides):
        log_depth[row, keypoint[start : start + len(xy)]] = np.log(np.maximum(depth, 1e-300))
        start += len(xy)
    found = []
    for row, (edge, _, _) in enumerate(sides[:-1]):
        difference = log_depth[row] - log_depth[row + 1 :]  # [others, keypoints]
        shared = np.isfinite(difference)
        for other in np.flatnonzero(shared.sum(axis=1) >= MIN_SHARED_POINTS):
            values = difference[other, shared[other]]
            ratio = _median(values)
            spread = 1.4826 * _median(np.abs(values - ratio))
            weight = min(len(values), 100) / (spread**2 + RATIO_NOISE**2)
            found.append((float(edge), float(sides[row + 1 + other][0]), ratio, weight))
    return found


def _median(values: Float64) -> float:
    """As NumPy's, whose checks take several times as long as the few values that there are."""
    ordered, half = np.sort(values), len(values) // 2
    return float(ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2)


def average_scales(ratios: Ratios, num_edges: int) -> tuple[Float64, Int32]:
    """Scale of every edge relative to its group, by L1 averaging of the ratios.

    Returns:
        [E] positive scales, geometric mean 1 in each group, and [E] the group of each edge: between groups no points
        are shared.
    """
    log_scale, group = np.zeros(num_edges), np.zeros(num_edges, np.int32)
    for number, part in enumerate(components(num_edges, ratios.edges)):
        group[part] = number
        inside = np.isin(ratios.edges[:, 0], part)
        if len(part) > 1:
            local = np.searchsorted(part, ratios.edges[inside]).astype(np.int32)
            log_scale[part] = _average(len(part), local, ratios.log_ratio[inside], ratios.weight[inside])
    return np.exp(log_scale), group


def _average(count: int, pairs: Int32, difference: Float64, weight: Float64) -> Float64:
    """Values [count] of mean 0 with x_b − x_a = difference, robustly."""
    values = np.zeros(count)
    weight = weight / weight.max()
    rows = np.repeat(np.arange(len(pairs)), 2)
    signs = np.tile([-1.0, 1.0], len(pairs))
    matrix = scipy.sparse.csr_array((signs, (rows, pairs.ravel())), shape=(len(pairs), count))
    for _ in range(STEPS):
        error = np.abs(matrix @ values - difference)
        robust = np.maximum(weight / np.maximum(error, 0.5 * RATIO_NOISE), 1e-9)
        normal = (matrix.T @ (matrix * robust[:, None])).tocsc()
        updated = np.zeros(count)
        updated[1:] = splu(normal[1:, 1:]).solve((matrix.T @ (robust * difference))[1:])
        updated -= updated.mean()
        change = float(np.abs(updated - values).max())
        values = updated
        if change < CONVERGED:
            break
    return values


def solve_positions(
    edges: EdgeSet, rotations: Float64, scales: Float64, group: Int32, angle: Float64
) -> tuple[Float64, Float64, tuple[float, ...]]:
    """Camera centres [n, 3] from the edges' vectors, by re-weighted least squares; the mean baseline is 1.

    Args:
        edges: a connected set, all with a baseline.
        rotations: [n, 3, 3] world-to-camera.
        scales: [E].
        group: [E] groups of edges; the relative scale of the groups is solved for, too.
        angle: [E] median angle in radians between the rays of an edge: small angles fix the direction badly.

    Returns:
        the centres, the angle in radians [E] between each edge's vector and the centres' difference, and the robust
        loss after each step.

    Raises:
        DivergedError: the system has no finite solution.
    """
    turned = np.einsum("eji,ej->ei", rotations[edges.pairs[:, 1]], edges.translation)
    vectors = -turned * (scales / np.exp(np.mean(np.log(scales))))[:, None]
    length = np.linalg.norm(vectors, axis=1)
    reliable = edges.weight * np.minimum(1.0, angle / RELIABLE_ANGLE) ** 2
    problem = _Problem(
        edges=replace(edges, weight=reliable),
        vectors=vectors,
        group=group,
        length=length,
        floor=0.1 * float(np.median(length)),
    )
    try:
        # Where wrong edges are many but thin, a tree of the reliable ones avoids them; where they look as good as the
        # others, the least sum of distances over all edges outvotes them. The better explanation wins.
        starts = problem.along_tree(), problem.least_distances()
        centres, history = min((problem.refine(*start) for start in starts), key=lambda result: result[1][-1])
    except (RuntimeError, ValueError) as singular:
        raise DivergedError(f"the camera positions did not converge: {singular}") from singular
    if not np.isfinite(centres).all():
        raise DivergedError("the camera positions did not converge: the pairs' baselines contradict each other")
    solved = centres[edges.pairs[:, 1]] - centres[edges.pairs[:, 0]]
    error = np.arctan2(np.linalg.norm(np.cross(solved, vectors), axis=1), (solved * vectors).sum(axis=1))
    baseline = float(np.linalg.norm(solved, axis=1).mean())
    return centres / max(baseline, 1e-12), error, tuple(history)


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Known vectors between unknown centres, up to one stretch per group."""

    edges: EdgeSet
    vectors: Float64
    """[E, 3]."""
    group: Int32
    """[E]."""
    length: Float64
    """[E] of the vectors."""
    floor: float
    """Error of a baseline that does not shrink with its length."""

    def along_tree(self) -> tuple[Float64, Float64]:
        """Centres [n, 3] along the spanning tree of the most reliable edges, and stretches [G] of 1."""
        centres = np.zeros((self.edges.num_images, 3))
        for parent, child, edge in spanning_tree(self.edges):
            forward = self.edges.pairs[edge, 0] == parent
            centres[child] = centres[parent] + (self.vectors[edge] if forward else -self.vectors[edge])
        return centres, np.ones(int(self.group.max()) + 1)

    def least_distances(self) -> tuple[Float64, Float64]:
        """Centres and stretches of the least weighted sum of relative errors (L1)."""
        robust = np.ones(len(self.vectors))
        for _ in range(STEPS):
            centres, stretch = self._solve(robust)
            robust = 1 / np.maximum(self._relative_error(centres, stretch), L1_FLOOR)
        return centres, stretch

    def refine(self, centres: Float64, stretch: Float64) -> tuple[Float64, tuple[float, ...]]:
        """Robust centres from a start, with a kernel that gets tighter, and its loss after each step."""
        history: list[float] = []
        for scale in ROBUST_SCALES:
            for step in range(STEPS):
                squared = self._relative_error(centres, stretch) ** 2
                history.append(float(np.average(squared / (scale**2 + squared), weights=self.edges.weight)))
                if step and abs(history[-2] - history[-1]) < CONVERGED:
                    break
                centres, stretch = self._solve((scale**2 / (scale**2 + squared)) ** 2)
        return centres, tuple(history)

    def _relative_error(self, centres: Float64, stretch: Float64) -> Float64:
        stretched = stretch[self.group]
        solved = centres[self.edges.pairs[:, 1]] - centres[self.edges.pairs[:, 0]]
        miss = np.linalg.norm(solved - stretched[:, None] * self.vectors, axis=1)
        return np.asarray(miss / (self.length * stretched + self.floor), np.float64)

    def _solve(self, robust: Float64) -> tuple[Float64, Float64]:
        # The error of a baseline grows with its length, so that its square divides the weight.
        weight = self.edges.weight / self.edges.weight.max() / (self.length**2 + self.floor**2)
        return _solve_linear(self.edges, self.vectors, self.group, weight * robust)


def _solve_linear(edges: EdgeSet, vectors: Float64, group: Int32, weight: Float64) -> tuple[Float64, Float64]:
    """Centres [n, 3] with the first at 0, and the stretch of every group [G] with the first at 1."""
    count, groups = edges.num_images, int(group.max()) + 1
    weight = np.maximum(weight, 1e-9 * float(weight.max()))
    number = len(vectors)
    row = np.arange(3 * number)
    first = (3 * edges.pairs[:, 0, None] + np.arange(3)).ravel()
    second = (3 * edges.pairs[:, 1, None] + np.arange(3)).ravel()
    stretch = 3 * count + np.repeat(group, 3)
    values = np.concatenate([np.ones(3 * number), -np.ones(3 * number), -vectors.ravel()])
    matrix = scipy.sparse.csc_array(
        (values, (np.tile(row, 3), np.concatenate([second, first, stretch]))), shape=(3 * number, 3 * count + groups)
    )
    scaled = np.sqrt(np.repeat(weight, 3))[:, None]
    known = 3 * count  # the stretch of group 0
    free = np.r_[3 : 3 * count, known + 1 : known + groups]
    left = (matrix[:, free] * scaled).tocsc()
    right = -(matrix[:, [known]] * scaled).toarray()[:, 0]
    normal = (left.T @ left + 1e-12 * float(weight.max()) * scipy.sparse.eye_array(len(free))).tocsc()
    solution = splu(normal).solve(left.T @ right)
    centres = np.concatenate([np.zeros(3), solution[: 3 * count - 3]]).reshape(count, 3)
    return centres, np.maximum(np.concatenate([[1.0], solution[3 * count - 3 :]]), 1e-6)
