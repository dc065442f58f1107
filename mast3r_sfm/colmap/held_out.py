"""Whether parameters of cameras explain observations that they were not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import pycolmap

from mast3r_sfm.colmap.held import Held
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.colmap.sample import place_points, take_over
from mast3r_sfm.colmap.solving import solve, solve_with_shifts
from mast3r_sfm.types import Bool, Float64


def gains_of_shifts(
    sample: pycolmap.Reconstruction, options: pycolmap.BundleAdjustmentOptions, held: Held, shifted: Collection[int]
) -> dict[int, float]:
    """By what share refined principal points lower the error of points that took no part in refining them.

    Poses and cameras are adjusted to every other point, with the principal points and without; the points between are
    placed by each, and their observations compared. Then the other way round.

    Args:
        sample: an adjusted model; it is not changed.
        options: of bundle adjustment.
        held: what is known.
        shifted: the cameras whose principal points are in question.

    Returns:
        the share of the robust error of each of these cameras that goes; negative where it grows.
    """

    def with_shifts(half: pycolmap.Reconstruction) -> None:
        solve_with_shifts(half, options, held, shifted)

    def without(half: pycolmap.Reconstruction) -> None:
        solve(half, options, held)

    even = np.arange(sample.num_points3D()) % 2 == 0
    scale = float(options.ceres.loss_function_scale)
    costs = {number: np.zeros(2) for number in shifted}
    for chosen in (even, ~even):
        for column, adjust in enumerate((without, with_shifts)):
            for number, cost in _held_out_costs(sample, chosen, adjust, scale).items():
                if number in costs:
                    costs[number][column] += cost
    return {number: float((before - after) / max(before, 1e-12)) for number, (before, after) in costs.items()}


def _held_out_costs(
    sample: pycolmap.Reconstruction,
    chosen: Bool,
    adjust: Callable[[pycolmap.Reconstruction], None],
    scale_px: float,
) -> dict[int, float]:
    """Robust error of the observations of each camera, of the points that are not `chosen` [K] to be adjusted to."""
    fitted, others = _only(sample, chosen), _only(sample, ~chosen)
    adjust(fitted)
    tracks = ColmapModel(others).tracks()
    take_over(others, fitted)
    place_points(others, tracks, scale_px)
    model = ColmapModel(others)
    costs: dict[int, float] = {}
    points = np.array([others.point3D(number).xyz for number in sorted(others.point3D_ids())]).reshape(-1, 3)
    for image in np.unique(tracks.image).tolist():
        mine = tracks.image == image
        error = np.linalg.norm(model.project(image, points[tracks.point[mine]]) - tracks.xy[mine], axis=1)
        camera = others.image(image + 1).camera_id
        costs[camera] = costs.get(camera, 0.0) + _soft_l1(error, scale_px)
    return costs


def _soft_l1(error: Float64, scale: float) -> float:
    """The sum of a loss that grows like the square and then in proportion; what is behind the camera says nothing."""
    return float(2 * scale**2 * (np.sqrt(1 + (error[np.isfinite(error)] / scale) ** 2) - 1).sum())


def _only(sample: pycolmap.Reconstruction, chosen: Bool) -> pycolmap.Reconstruction:
    """A copy with the points that are chosen [K], in the order of their numbers."""
    copy = pycolmap.Reconstruction(sample)
    for number in np.array(sorted(copy.point3D_ids()), np.int64)[~chosen].tolist():
        copy.delete_point3D(number)
    return copy
