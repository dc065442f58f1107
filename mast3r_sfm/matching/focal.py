"""Focal lengths of unknown cameras from the fundamental matrices of the view graph.

With the right intrinsics, E = K₂ᵀ F K₁ has two equal singular values (Hartley 1992; Mendonça & Cipolla 1999). The
focal length that makes them most equal over all pairs of a camera is found by exhaustive search, so that no start
value matters, and robustly, so that single bad pairs do not.
"""

from __future__ import annotations

import numpy as np

from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.types import Float64, Int32

TYPICAL_RATIO = 1.0
"""Focal length over the image's long side where nothing is known: between a phone's 0.75 and a short tele lens."""
CANDIDATES = np.geomspace(0.35, 4.0, 97)
PRIOR_WEIGHT = 0.01
"""Pull towards TYPICAL_RATIO, in units of the cost; decides only where the pairs say nothing, as in forward motion."""
OUTLIER_COST = 0.3
SWEEPS = 3
MAX_HOMOGRAPHY_SHARE = 0.7
"""Above it a pair is (nearly) planar and its fundamental matrix says nothing of the focal length."""


def estimate_focal_ratios(
    edges: list[EpipolarEdge], camera_of_image: Int32, sizes: Float64, known: Float64
) -> Float64:
    """Focal length of each camera, over the long side of its image.

    Args:
        edges: checked pairs.
        camera_of_image: [N] camera of each image.
        sizes: [N, 2] width and height in network pixels.
        known: [C] ratio where it is known, NaN elsewhere.

    Returns:
        [C]: the known ratios, and estimates where the pairs allow one, else TYPICAL_RATIO.
    """
    ratios = np.where(np.isnan(known), TYPICAL_RATIO, known)
    usable = [edge for edge in edges if edge.verdict.is_link]
    general = [edge for edge in usable if edge.homography_share < MAX_HOMOGRAPHY_SHARE]
    # A turning camera on a tripod gives homographies only, but with any translation E = [t]× K⁻¹ H K they tell the
    # focal length all the same; a plane does not, and is left to bundle adjustment.
    usable = general or usable
    if not usable:
        return ratios
    pairs = np.array([(edge.first, edge.second) for edge in usable])
    cameras = camera_of_image[pairs]  # [P, 2]
    centred = _centred(np.array([edge.fundamental for edge in usable]), sizes[pairs] / 2)
    long_side = sizes.max(axis=1)[pairs]  # [P, 2]
    weight = np.sqrt([len(edge.xy_first) for edge in usable])
    for _ in range(SWEEPS):
        for camera in np.flatnonzero(np.isnan(known)):
            mine = (cameras == camera).any(axis=1)
            if mine.any():
                ratios[camera] = _best_ratio(
                    centred[mine], long_side[mine], cameras[mine] == camera, ratios[cameras[mine]], weight[mine]
                )
        if len(ratios) == 1:
            break
    return ratios


def _best_ratio(
    fundamental: Float64, long_side: Float64, is_mine: np.ndarray, ratios: Float64, weight: Float64  # type: ignore[type-arg]
) -> float:
    """The candidate of least cost. Shapes: [P, 3, 3], [P, 2], bool [P, 2], [P, 2], [P]."""
    candidates = CANDIDATES[:, None, None]
    focal = np.where(is_mine, candidates, ratios) * long_side  # [candidates, P, 2]
    cost = np.minimum(essential_defect(fundamental, focal[..., 0], focal[..., 1]), OUTLIER_COST)
    total = (cost * weight).sum(axis=1) / weight.sum() + PRIOR_WEIGHT * np.log(CANDIDATES / TYPICAL_RATIO) ** 2
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
    values = np.linalg.svd(fundamental * first * second, compute_uv=False)
    defect: Float64 = (values[..., 0] - values[..., 1]) / np.maximum(values[..., 0] + values[..., 1], 1e-300)
    return defect


def _centred(fundamental: Float64, centres: Float64) -> Float64:
    """F [P, 3, 3] for pixels relative to the image centres [P, 2, 2] of both views."""
    shift = np.tile(np.eye(3), (len(centres), 2, 1, 1))
    shift[:, :, :2, 2] = centres
    centred: Float64 = shift[:, 1].transpose(0, 2, 1) @ fundamental @ shift[:, 0]
    return centred
