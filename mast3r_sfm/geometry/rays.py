"""Points from the rays on which they were seen."""

from __future__ import annotations

import numpy as np

from mast3r_sfm.types import Float64, Int64

ROUNDS = 3
"""Of weighing the rays anew; after two, places change by a hundredth of their error."""
_HOLD = 1e-6
"""Share of a point's weight that leaves it where it was: all that two parallel rays say of the direction along them."""


def meet_rays(points: Float64, point: Int64, centres: Float64, rays: Float64, scale: float) -> Float64:
    """Where rays meet best: the least squares of their angles from the points, with the weights of a soft L1 loss.

    Args:
        points: [K, 3] about where they are.
        point: [O] which of them each ray was sent to.
        centres: [O, 3] where the rays begin.
        rays: [O, 3] their unit directions.
        scale: angle in radians from which on a ray counts less.

    Returns:
        [K, 3] the points; those without a ray as they were.
    """
    for _ in range(ROUNDS):
        towards = points[point] - centres
        distance = np.linalg.norm(towards, axis=1).clip(min=1e-12)
        angle = np.linalg.norm(np.cross(towards, rays), axis=1) / distance
        # The sine of the angle, over the distance, is the way from the point to the ray.
        weight = 1 / (distance**2 * np.sqrt(1 + (angle / scale) ** 2))
        points = _nearest(points, point, centres, rays, weight)
    return points


def _nearest(points: Float64, point: Int64, centres: Float64, rays: Float64, weight: Float64) -> Float64:
    """[K, 3] the points of least weighted squared distances from their rays."""
    across = weight[:, None, None] * (np.eye(3) - rays[:, :, None] * rays[:, None])
    pull = np.einsum("oij,oj->oi", across, centres - points[point])
    matrix, right = _summed(point, across, len(points)), _summed(point, pull, len(points))
    total = np.trace(matrix, axis1=1, axis2=2)
    matrix += np.where(total > 0, _HOLD * total, 1.0)[:, None, None] * np.eye(3)
    return np.asarray(points + np.linalg.solve(matrix, right[:, :, None])[:, :, 0], np.float64)


def _summed(point: Int64, values: Float64, count: int) -> Float64:
    """[K, …] sums of the values [O, …] of each point."""
    inner = values.shape[1:]
    total = np.zeros((count, int(np.prod(inner))))
    for column, one in enumerate(values.reshape(len(values), total.shape[1]).T):
        total[:, column] = np.bincount(point, one, minlength=count)
    return total.reshape(count, *inner)
