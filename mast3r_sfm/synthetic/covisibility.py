"""Which pixels of one view another view sees, and where."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.synthetic.render import View
from mast3r_sfm.types import Float64

_DEPTH_TOLERANCE = 0.005
"""Relative difference of depths up to which two points lie on the same surface."""


def correspond(first: View, second: View) -> tuple[Float64, NDArray[np.bool_]]:
    """Find the true place in the second view of each pixel centre of the first.

    Returns:
        [H, W, 2] pixels of the second view (COLMAP's), meaningless where not seen; [H, W] whether the second view sees
        the point: in front, between its outermost pixel centres, and not occluded. Points within a pixel of an
        occluding edge count as not seen.
    """
    xy, depth = second.camera.project(first.points_world)
    column, row = xy[..., 0] - 0.5, xy[..., 1] - 0.5
    height, width = second.depth.shape
    inside = (depth > 1e-6) & (column >= 0) & (row >= 0) & (column <= width - 1) & (row <= height - 1)
    surface = _interpolate_depth(second.depth, np.where(inside, column, 0.0), np.where(inside, row, 0.0))
    return xy, inside & (np.abs(surface / np.where(inside, depth, 1.0) - 1) < _DEPTH_TOLERANCE)


def _interpolate_depth(depth: Float64, column: Float64, row: Float64) -> Float64:
    """Depth between pixel centres. On a plane the inverse depth is linear in the pixels, so this is exact there."""
    inverse = 1 / depth
    left = np.minimum(column.astype(np.int64), depth.shape[1] - 2)
    top = np.minimum(row.astype(np.int64), depth.shape[0] - 2)
    x, y = column - left, row - top
    upper = inverse[top, left] * (1 - x) + inverse[top, left + 1] * x
    lower = inverse[top + 1, left] * (1 - x) + inverse[top + 1, left + 1] * x
    result: Float64 = 1 / (upper * (1 - y) + lower * y)
    return result
