"""The fine loss of the alignment of pointmaps, and its linearisation.

How far from the matched pixel does the point of one image project into the other? Summed over the matches by their
confidence, through a kernel of logarithmic growth (Cauchy): w · γ²/2 · log(1 + (r/γ)²).

With x = X/Z and y = Y/Z of a point in the target's frame, all that a residual depends on besides its depth are eight
local unknowns of a directed edge: the turn and shift from source to target, and both focal lengths. Sums over matches
are of these, and become sums over poses by the chain rule, edge by edge. A scale moves the point along its ray, as the
depth does; in the target, that is a shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mast3r_sfm.alignment.canonical import GRID_PX
from mast3r_sfm.alignment.elimination import SharedAnchors, eliminate, find_shared
from mast3r_sfm.alignment.normal import (
    PER_IMAGE,
    Coupling,
    Depths,
    EdgeBlock,
    Matrix,
    NormalEquations,
    add_matrices,
    edge_columns,
    sum_edges,
)
from mast3r_sfm.alignment.problem import LEAST_RELATIVE, Batch, PointmapProblem, Scene, make_batches
from mast3r_sfm.geometry.rigid import rotation_from_axis_angle
from mast3r_sfm.types import Bool, Float64, Int64

_MIN_DEPTH = 1e-3
"""Of a projected point, over its distance: what is nearer to the image plane, or behind it, is treated as there."""
_AHEAD = 0.1
"""Cosine between the optical axis and the direction of a point beyond which it is not seen."""
_SPREAD_PX = GRID_PX / np.sqrt(12.0)
"""Standard deviation of places in a grid cell, along one axis."""
_TINY = 1e-12
_LOCAL = 8
"""Local unknowns of a directed edge."""
GROUP_MATCHES = 1 << 17
"""Matches whose depths are eliminated at a time."""
KEPT_PAIRS = 1 << 27
"""Pairs of matches that see one anchor that are kept, of eight bytes each; others are sought in every step."""


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
        self._anchors, where = np.unique(problem.anchor, return_inverse=True)
        self._groups = [
            [_prepare(problem, where.reshape(problem.anchor.shape), side, batch) for side, batch in group]
            for group in _by_source(problem)
        ]
        self._shared: dict[int, SharedAnchors] = {}
        self._shown: tuple[Scene, list[list[_Shown]]] | None = None
        self._unsure: list[list[Float64]] | None = None
        if near is not None and problem.place_error_px:
            self._unsure = self._find_unsure(near)
            self._shown = None

    def residuals(self, scene: Scene) -> Float64:
        """[M, 2] distances in pixels from the match, of the point of each side in the other image."""
        size = np.zeros((len(self.problem.weight), 2))
        for group, shown in zip(self._groups, self._project(scene), strict=True):
            for given, one in zip(group, shown, strict=True):
                size[given.batch.rows, given.side] = np.linalg.norm(one.residual, axis=1)
        return size

    def value(self, scene: Scene) -> float:
        """Mean over matches and both ways, and the priors."""
        prior = float(((scene.log_depth / self.priors.log_depth) ** 2).sum())
        prior += float(((self._focal_change(scene) / self.priors.log_focal) ** 2).sum())
        total = 0.0
        for group, shown in zip(self._groups, self._project(scene), strict=True):
            for given, one in zip(group, shown, strict=True):
                total += float(np.vdot(given.weight, np.log1p(one.squared / self.kernel**2)))
        both = 2 * float(self.problem.weight.sum())
        return 0.5 * (self.kernel**2 * total + prior) / max(both, 1e-300)

    def linearise(self, scene: Scene, fixed: Bool) -> NormalEquations:
        """Normal equations of one step; unknowns that are `fixed` [P] stay."""
        images, cameras = self.problem.num_images, self.problem.num_cameras
        unknowns = PER_IMAGE * images + cameras
        found = [
            [self._linearise(given, one) for given, one in zip(group, shown, strict=True)]
            for group, shown in zip(self._groups, self._project(scene), strict=True)
        ]
        camera, focal_weight = self.problem.camera_of_image, 1.0 / self.priors.log_focal**2
        prior = np.zeros(unknowns)
        prior[PER_IMAGE * images :] = focal_weight * np.bincount(camera, minlength=cameras)
        matrix, gradient = sum_edges((one.edges for group in found for one in group), unknowns, prior)
        gradient[PER_IMAGE * images :] += focal_weight * np.bincount(camera, self._focal_change(scene), cameras)
        free = ~fixed
        free[PER_IMAGE * images :] &= ~self.problem.focal_is_known
        return NormalEquations(
            matrix=matrix,
            gradient=gradient,
            depths=self._eliminate(scene, found, unknowns) if self.move_depths else None,
            num_anchors=len(scene.log_depth),
            free=free,
        )

    def unit_variance(self, scene: Scene) -> float:
        """Variance of an unknown at the least of the loss, over its entry of the inverse of the normal matrix.

        For errors that are independent and alike in both directions, by the kernel's influence and its slope (Huber,
        Robust Statistics, 1981, section 7.6). Both residuals of a match have one error, which counts twice.
        """
        shown = [one for group in self._project(scene) for one in group]
        squared = np.concatenate([one.squared.ravel() for one in shown]) / self.kernel**2
        weight = np.concatenate([given.weight.ravel() for group in self._groups for given in group])

        def mean(values: Float64) -> float:
            return float((weight * values).sum() / weight.sum())

        influence = 0.5 * self.kernel**2 * mean(weight * squared / (1 + squared) ** 2)
        return 2 * influence * mean(1 / (1 + squared)) / mean(1 / (1 + squared) ** 2) ** 2

    def _focal_change(self, scene: Scene) -> Float64:
        return np.log(scene.focal_px[self.problem.camera_of_image] / self.problem.base_focal_px)

    def _find_unsure(self, scene: Scene) -> list[list[Float64]]:
        """[B, 2, K] v of the matches of every batch, with which an error e counts as e − v (v · e).

        A match is wrong by a pixel or so in either image. In the one that the point comes from, that makes its depth
        wrong where the surface is steep or ends, and the point appears displaced along its epipolar line. There, the
        error is divided by √(1 + s²), where s is the displacement in pixels.
        """
        change = self.problem.place_error_px * _change_of_depth(self.problem)

        def of(given: _Given, shown: _Shown) -> Float64:
            moved = shown.focal[:, None, None] * shown.by_depth()
            length = np.maximum(np.linalg.norm(moved, axis=1), _TINY)
            # What would be seen from the side or from behind is a wrong match, and its whole error is to count.
            far = change[self._anchors[given.where]] * length * (shown.cosine > _AHEAD)
            return np.asarray(moved * (np.sqrt(1 - 1 / np.sqrt(1 + far**2)) / length)[:, None])

        return [
            [of(*one) for one in zip(group, shown, strict=True)]
            for group, shown in zip(self._groups, self._project(scene), strict=True)
        ]

    def _project(self, scene: Scene) -> list[list[_Shown]]:
        """All matches of every batch in its target images; those of the last scene are kept."""
        if self._shown is None or self._shown[0] is not scene:
            depth = self.problem.anchor_depth[self._anchors] * np.exp(scene.log_depth[self._anchors])
            shown = [
                [
                    _project(self.problem, scene, given, depth, None if self._unsure is None else self._unsure[g][b])
                    for b, given in enumerate(group)
                ]
                for g, group in enumerate(self._groups)
            ]
            self._shown = scene, shown
        return self._shown[1]

    def _linearise(self, given: _Given, shown: _Shown) -> _Linear:
        # The error of a point behind the camera has no useful slope.
        weight = given.weight * shown.ahead / (1 + shown.squared / self.kernel**2)
        rows = _jacobian(shown)
        if shown.unsure is not None:
            rows -= shown.unsure[:, None] * (shown.unsure[:, None] * rows).sum(axis=2, keepdims=True)
        rows *= np.sqrt(weight)[:, None, None]
        flat = rows[:, : _LOCAL + 1].reshape(len(rows), _LOCAL + 1, -1)
        moments = flat @ flat.transpose(0, 2, 1)
        chain = _chain(shown)
        back = chain.transpose(0, 2, 1)
        edges = EdgeBlock(
            columns=given.columns,
            matrix=back @ moments[:, :_LOCAL, :_LOCAL] @ chain,
            gradient=(back @ moments[:, :_LOCAL, _LOCAL:])[..., 0],
        )
        depth = rows[:, _LOCAL + 1] * shown.focal[:, None, None]
        coupling = rows[:, :, 0] * depth[:, None, 0]
        coupling += rows[:, :, 1] * depth[:, None, 1]
        coupling[:, _LOCAL + 1] *= shown.focal[:, None]
        return _Linear(edges=edges, chain=chain, coupling=coupling)

    def _eliminate(self, scene: Scene, found: list[list[_Linear]], unknowns: int) -> Depths:
        prior, count = 1.0 / self.priors.log_depth**2, len(self._anchors)
        diagonal, gradient = np.full(count, prior), prior * scene.log_depth[self._anchors]
        for group, ones in zip(self._groups, found, strict=True):
            for given, one in zip(group, ones, strict=True):
                where = given.where.ravel()
                gradient += np.bincount(where, one.coupling[:, _LOCAL].ravel(), count)
                diagonal += np.bincount(where, one.coupling[:, _LOCAL + 1].ravel(), count)
        root = np.sqrt(diagonal)
        gradient /= root
        couplings: list[Coupling] = []
        shares: list[Matrix] = []
        right = np.zeros(unknowns)
        for number, (group, ones) in enumerate(zip(self._groups, found, strict=True)):
            scaled = [
                Coupling(where=given.where, columns=given.columns, chain=one.chain, values=_scaled(one, given, root))
                for given, one in zip(group, ones, strict=True)
            ]
            taken, added = eliminate(scaled, gradient, self._shared_anchors(number), unknowns)
            shares = [taken if not shares else add_matrices(shares[0], taken)]
            right += added
            couplings += scaled
        return Depths(
            anchors=self._anchors, root=root, gradient=gradient, couplings=couplings, matrix=shares[0], right=right
        )

    def _shared_anchors(self, group: int) -> SharedAnchors:
        """Kept from step to step as far as there is room: they grow with the square of an anchor's matches."""
        if group in self._shared:
            return self._shared[group]
        found = _find_shared(self._groups[group])
        if found.left.size + sum(one.left.size for one in self._shared.values()) <= KEPT_PAIRS:
            self._shared[group] = found
        return found


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What does not change from step to step, of a batch of edges one way."""

    batch: Batch
    side: int
    source: Int64
    """[B] images."""
    target: Int64
    columns: Int64
    """[B, 15] unknowns."""
    where: Int64
    """[B, K] numbers of the anchors, among those that are seen."""
    ray: Float64
    """[B, 3, K] pixel in the source, and 1."""
    pixel: Float64
    """[B, 2, K] in the target."""
    steep: Float64
    """[B, K] depth over the anchor's, less 1."""
    weight: Float64
    """[B, K]; 0 where a match is a repeated one."""


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """Points of a batch in the target images."""

    turn: Float64
    """[B, 3, 3] target from source."""
    shift: Float64
    """[B, 3]."""
    focal: Float64
    """[B] of the target."""
    depth: Float64
    """[B, K] in the source."""
    stretch: Float64
    """[B, K] 1 and the relative change of that depth when rays get steeper: it follows the angle of the surface."""
    place: Float64
    """[B, 2, K] x = X/Z and y = Y/Z."""
    inverse: Float64
    """[B, K] 1/Z."""
    cosine: Float64
    """[B, K] between the optical axis and the direction of the point."""
    residual: Float64
    """[B, 2, K]."""
    unsure: Float64 | None
    """[B, 2, K] as in `FineLoss._find_unsure`."""
    squared: Float64
    """[B, K] length of the residual as it counts."""

    @property
    def ahead(self) -> Bool:
        """[B, K] whether the point is well before the camera."""
        return self.cosine >= _MIN_DEPTH

    def across(self, vector: Float64) -> Float64:
        """[B, 2, K] change of the place when the point moves by a vector [B, 3]."""
        return np.asarray((vector[:, :2, None] - self.place * vector[:, 2:, None]) * self.inverse[:, None])

    def by_depth(self) -> Float64:
        """[B, 2, K] change of the place with the logarithm of the depth: the point moves along its ray, from −shift."""
        return self.across(-self.shift)


@dataclass(frozen=True, kw_only=True)
class _Linear:
    edges: EdgeBlock
    chain: Float64
    """[B, 8, 15] change of the local unknowns with the unknowns."""
    coupling: Float64
    """[B, 10, K] of the depth of a match with the local unknowns, its gradient, and its diagonal."""


def _prepare(problem: PointmapProblem, where: Int64, side: int, batch: Batch) -> _Given:
    pixels = problem.pixels[batch.rows]
    ray = np.ones((len(batch.edges), 3, batch.rows.shape[1]))
    ray[:, :2] = pixels[:, :, side].transpose(0, 2, 1)
    source, target = problem.pairs[batch.edges][:, [side, 1 - side]].T.astype(np.int64)
    return _Given(
        batch=batch,
        side=side,
        source=source,
        target=target,
        columns=edge_columns(problem, batch, (side, 1 - side), focal=True),
        where=where[batch.rows, side],
        ray=ray,
        pixel=np.ascontiguousarray(pixels[:, :, 1 - side].transpose(0, 2, 1)),
        steep=problem.offset[batch.rows, side] - 1.0,
        weight=problem.weight[batch.rows] * batch.used,
    )


def _project(problem: PointmapProblem, scene: Scene, given: _Given, depths: Float64, unsure: Float64 | None) -> _Shown:
    """Points of a batch, with the depths [D] of the anchors in units of canonical views."""
    pose, other = scene.cam_from_world[given.source], scene.cam_from_world[given.target]
    turn = other[:, :, :3] @ pose[:, :, :3].transpose(0, 2, 1)
    shift = other[:, :, 3] - (turn @ pose[:, :, 3:])[..., 0]
    from_focal, focal = (scene.focal_px[problem.camera_of_image[one]] for one in (given.source, given.target))
    steep = given.steep * (problem.base_focal_px[given.source] / from_focal)[:, None]
    relative = np.maximum(1.0 + steep, LEAST_RELATIVE)
    depth = np.take(depths, given.where) * relative * np.exp(scene.log_scale[given.source])[:, None]
    by_ray = turn / np.stack([from_focal, from_focal, np.ones_like(from_focal)], axis=1)[:, None]
    seen = by_ray @ given.ray
    seen *= depth[:, None]
    seen += shift[..., None]
    distance = np.sqrt((seen * seen).sum(axis=1))
    cosine = seen[:, 2] / distance
    inverse = 1.0 / np.maximum(seen[:, 2], _MIN_DEPTH * distance)
    place = seen[:, :2] * inverse[:, None]
    residual = focal[:, None, None] * place - given.pixel
    counted = residual if unsure is None else residual - unsure * (unsure * residual).sum(axis=1, keepdims=True)
    return _Shown(
        turn=turn,
        shift=shift,
        focal=focal,
        depth=depth,
        stretch=1.0 + steep / relative,
        place=place,
        inverse=inverse,
        cosine=cosine,
        residual=residual,
        unsure=unsure,
        squared=(counted * counted).sum(axis=1),
    )


def _jacobian(shown: _Shown) -> Float64:
    """[B, 10, 2, K]: change of the place with the local unknowns, then residual, then change with depth.

    The local unknowns are the turn and the shift from source to target, the source's focal length, and the target's.
    """
    edges, matches = shown.depth.shape
    rows = np.empty((edges, _LOCAL + 2, 2, matches))
    x, y = shown.place[:, 0], shown.place[:, 1]
    rows[:, 1, 1] = x * y
    rows[:, 0, 0] = -rows[:, 1, 1]
    rows[:, 0, 1] = -1.0 - y * y
    rows[:, 1, 0] = 1.0 + x * x
    rows[:, 2, 0] = -y
    rows[:, 2, 1] = x
    rows[:, 3, 0] = rows[:, 4, 1] = shown.inverse
    rows[:, 3, 1] = rows[:, 4, 0] = 0.0
    rows[:, 5] = -shown.place * shown.inverse[:, None]
    rows[:, 9] = shown.by_depth()
    rows[:, 6] = shown.across(shown.turn[:, :, 2]) * shown.depth[:, None] - rows[:, 9] * shown.stretch[:, None]
    rows[:, 7] = shown.place
    rows[:, 8] = shown.residual
    return rows


def _chain(shown: _Shown) -> Float64:
    """[B, 8, 15] change of the local unknowns with turn, shift and scale of the source, turn and shift of the target,
    and both focal lengths; times the target's focal length, which makes pixels of places."""
    chain = np.zeros((len(shown.turn), _LOCAL, 2 * PER_IMAGE + 1))
    chain[:, :3, :3] = chain[:, 3:6, 3:6] = -shown.turn
    chain[:, 3:6, :3] = np.cross(shown.turn, shown.shift[..., None], axis=1)
    chain[:, 3:6, 6] = -shown.shift
    chain[:, range(6), range(7, 13)] = 1.0
    chain[:, 6, 13] = chain[:, 7, 14] = 1.0
    return chain * shown.focal[:, None, None]


def _scaled(linear: _Linear, given: _Given, root: Float64) -> Float64:
    """[B, K, 8] coupling of depths and local unknowns, over the roots [D] of the diagonals of the depths."""
    values = np.ascontiguousarray(linear.coupling[:, :_LOCAL].transpose(0, 2, 1))
    values *= (1 / root)[given.where][..., None]
    return values


def _find_shared(group: list[_Given]) -> SharedAnchors:
    anchors = np.concatenate([given.where.ravel() for given in group])
    used = np.concatenate([given.batch.used.ravel() for given in group]) > 0
    counts = [given.where.shape for given in group]
    edges = np.repeat(np.arange(sum(edges for edges, _ in counts)), np.concatenate([np.full(e, k) for e, k in counts]))
    return find_shared(anchors, edges, used)


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
