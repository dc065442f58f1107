"""Focal lengths of unknown cameras from the two-view geometries of the view graph.

With the right intrinsics, E = K₂ᵀ F K₁ has two equal singular values (Hartley 1992; Mendonça & Cipolla 1999); and where
the camera only turned, K₂⁻¹ H K₁ is a rotation, all of whose singular values are equal. The focal length that makes
them most equal over all pairs of a camera is found by exhaustive search, so that no start value matters, and robustly,
so that single bad pairs do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.matching.focal_fit import TYPICAL_RATIO, fit_focal_ratios
from mast3r_sfm.types import Bool, Float64, Int32

CANDIDATES = np.geomspace(0.35, 4.0, 97)
PRIOR_WEIGHT = 0.3
"""Pull towards TYPICAL_RATIO, in units of the cost; decides only where the pairs say nothing, as in forward motion."""
DEFECT_SCALE = 0.02
"""Defect of a good pair at the right focal length; larger ones count by their logarithm only."""
MAX_SWEEPS = 30
CONVERGED = 1e-3
MIN_GENERAL_SHARE = 0.2
"""Share of the links that must show depth for fundamental matrices to be believed: those of a plane or a turn are
arbitrary, and one in thirty of them does not look flat."""
MAX_TURN_DEFECT = 0.02
"""Spread of the singular values of K₂⁻¹ H K₁ up to which a turn explains H; measured 0.003 for turns, 0.22 for a
plane seen from different places."""


def estimate_focal_ratios(
    edges: list[EpipolarEdge],
    camera_of_image: Int32,
    sizes: Float64,
    known: Float64,
    centres: Float64 | None = None,
    threads: int = 1,
) -> Float64:
    """Focal length of each camera, over the long side of its image.

    Args:
        edges: checked pairs.
        camera_of_image: [N] camera of each image.
        sizes: [N, 2] width and height in network pixels.
        known: [C] ratio where it is known, NaN elsewhere.
        centres: [N, 2] principal points in network pixels; None: the middles of the images.
        threads: pairs that are looked at side by side.

    Returns:
        [C]: the known ratios, and estimates where the pairs allow one, else TYPICAL_RATIO.
    """
    links = [edge for edge in edges if edge.verdict.is_link]
    general = [edge for edge in links if not edge.is_flat]
    ratios = np.where(np.isnan(known), TYPICAL_RATIO, known)
    centres = sizes / 2 if centres is None else centres
    if len(general) > MIN_GENERAL_SHARE * len(links):
        geometry = _Geometry.of(general, "fundamental", camera_of_image, sizes, centres)
        ratios = _search(geometry, essential_defect, ratios, known)
        return fit_focal_ratios(links, camera_of_image, sizes, centres, ratios, np.isnan(known), threads)
    if links:
        geometry = _Geometry.of(links, "homography", camera_of_image, sizes, centres)
        turned = _search(geometry, turn_defect, ratios, known)
        focal = turned[geometry.cameras] * geometry.long_side
        if float(np.median(turn_defect(geometry.matrices, focal[:, 0], focal[:, 1]))) < MAX_TURN_DEFECT:
            return turned
    # A plane seen from different places tells next to nothing; bundle adjustment has to find out.
    return ratios


@dataclass(frozen=True, kw_only=True)
class _Geometry:
    """P matrices of one kind, for pixels relative to the principal points."""

    matrices: Float64
    """[P, 3, 3] fundamental matrices or homographies."""
    cameras: Int32
    """[P, 2]."""
    long_side: Float64
    """[P, 2] in network pixels."""
    weight: Float64
    """[P]."""

    @classmethod
    def of(
        cls, edges: list[EpipolarEdge], kind: str, camera_of_image: Int32, sizes: Float64, centres: Float64
    ) -> _Geometry:
        """Gather the attribute `kind` of the edges."""
        pairs = np.array([(edge.first, edge.second) for edge in edges])
        matrices = np.array([getattr(edge, kind) for edge in edges])
        shift = np.tile(np.eye(3), (len(pairs), 2, 1, 1))
        shift[:, :, :2, 2] = centres[pairs]
        left = shift[:, 1].transpose(0, 2, 1) if kind == "fundamental" else np.linalg.inv(shift[:, 1])
        return cls(
            matrices=left @ matrices @ shift[:, 0],
            cameras=camera_of_image[pairs],
            long_side=sizes.max(axis=1)[pairs],
            weight=np.sqrt([len(edge.xy_first) for edge in edges]),
        )

    def keep(self, mask: Bool) -> _Geometry:
        """The pairs where `mask` [P] is true."""
        return _Geometry(
            matrices=self.matrices[mask],
            cameras=self.cameras[mask],
            long_side=self.long_side[mask],
            weight=self.weight[mask],
        )


Defect = Callable[[Float64, Float64, Float64], Float64]


def _search(geometry: _Geometry, defect: Defect, ratios: Float64, known: Float64) -> Float64:
    """Ratios [C]: one unknown camera after the other, the rest held, until nothing changes much."""
    seen = np.isin(np.arange(len(ratios)), geometry.cameras)
    unknown = np.isnan(known) & seen
    # All alike first: where every pair has two unknown cameras, one of them alone finds only a compromise.
    ratios = np.where(unknown, _best_ratio(geometry, defect, unknown, ratios), ratios)
    for _ in range(MAX_SWEEPS if unknown.sum() > 1 else 0):
        before = ratios.copy()
        for camera in np.flatnonzero(unknown):
            mine = (geometry.cameras == camera).any(axis=1)
            ratios[camera] = _best_ratio(geometry.keep(mine), defect, np.arange(len(ratios)) == camera, ratios)
        if np.abs(ratios / before - 1).max() < CONVERGED:
            break
    return ratios


def _best_ratio(geometry: _Geometry, defect: Defect, free: Bool, ratios: Float64) -> float:
    """The candidate of least cost for all cameras where `free` [C], the others as in `ratios` [C]."""
    candidates = CANDIDATES[:, None, None]
    focal = np.where(free[geometry.cameras], candidates, ratios[geometry.cameras]) * geometry.long_side
    cost = np.log1p((defect(geometry.matrices, focal[..., 0], focal[..., 1]) / DEFECT_SCALE) ** 2)  # [candidates, P]
    prior = PRIOR_WEIGHT * np.log(CANDIDATES / TYPICAL_RATIO) ** 2
    total = (cost * geometry.weight).sum(axis=1) / geometry.weight.sum() + prior
    best = int(total.argmin())
    if not 0 < best < len(CANDIDATES) - 1:
        return float(CANDIDATES[best])
    # Parabola through the minimum and its neighbours, in the logarithm.
    left, middle, right = total[best - 1 : best + 2]
    offset = 0.5 * (left - right) / max(left - 2 * middle + right, 1e-12)
    return float(CANDIDATES[best] * (CANDIDATES[1] / CANDIDATES[0]) ** np.clip(offset, -0.5, 0.5))


def essential_defect(fundamental: Float64, focal_first: Float64, focal_second: Float64) -> Float64:
    """(σ₁ − σ₂) / (σ₁ + σ₂) of K₂ᵀ F K₁, 0 for a true essential matrix; pixels relative to the principal point.

    Args:
        fundamental: [P, 3, 3].
        focal_first: [..., P] in pixels.
        focal_second: [..., P].
    """
    first = np.stack([focal_first, focal_first, np.ones_like(focal_first)], axis=-1)[..., None, :]
    second = np.stack([focal_second, focal_second, np.ones_like(focal_second)], axis=-1)[..., :, None]
    essential = fundamental * first * second
    # The third singular value is 0: the other two follow from the sums of their squares and fourth powers.
    gram = essential.swapaxes(-1, -2) @ essential
    squares = np.trace(gram, axis1=-2, axis2=-1)
    product = np.sqrt(np.maximum((squares**2 - (gram**2).sum(axis=(-1, -2))) / 2, 0))
    defect: Float64 = np.sqrt(np.maximum(squares - 2 * product, 0) / np.maximum(squares + 2 * product, 1e-300))
    return defect


def turn_defect(homography: Float64, focal_first: Float64, focal_second: Float64) -> Float64:
    """(σ₁ − σ₃) / (σ₁ + σ₃) of K₂⁻¹ H K₁, 0 where the camera only turned; shapes as in `essential_defect`."""
    first = np.stack([focal_first, focal_first, np.ones_like(focal_first)], axis=-1)[..., None, :]
    second = np.stack([focal_second, focal_second, np.ones_like(focal_second)], axis=-1)[..., :, None]
    values = np.linalg.svd(homography * first / second, compute_uv=False)
    defect: Float64 = (values[..., 0] - values[..., 2]) / np.maximum(values[..., 0] + values[..., 2], 1e-300)
    return defect
