"""Matches of a pair before any geometric check, from either kind of model, in network pixels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import numpy as np
import torch

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.similarity import align_similarity_robust
from mast3r_sfm.matching.check import Putative
from mast3r_sfm.matching.nearest import mutual_nearest
from mast3r_sfm.matching.reciprocal import match_predictions
from mast3r_sfm.types import Encoding, Float64, Int64, PairPrediction

MAX_SEEDS = 4096
"""Pixels of an image from which matches are sought, at most."""
MIN_MATCHES = 8


def match_keypoints(first: Encoding, second: Encoding, config: MatchConfig) -> Putative:
    """Mutual nearest neighbours among the keypoints of two images."""
    pairs, similarity = mutual_nearest(_descriptors(first), _descriptors(second), config.min_similarity)
    return Putative(
        xy_first=network_xy(first)[pairs[:, 0]],
        xy_second=network_xy(second)[pairs[:, 1]],
        confidence=similarity,
    )


def _descriptors(encoding: Encoding) -> torch.Tensor:
    return torch.from_numpy(encoding.tokens.astype(np.float32))


def network_xy(encoding: Encoding) -> Float64:
    """Stored photo pixels scaled to the network's size, so that one camera's pixels keep one frame.

    Unlike `transform.to_network`, EXIF orientation is not applied: intrinsics belong to the stored pixels.
    """
    return encoding.xy.astype(np.float64) / encoding.transform.scale


PointsAt = Callable[[Int64, Int64], tuple[Float64, Float64]]
"""Pixels [M] of the first and of the second image (row · width + column) to the 3D points [M, 3] that they show, each
in its own camera's frame and both in one scale."""


def match_dense(
    orders: tuple[PairPrediction, PairPrediction],
    first: Encoding,
    second: Encoding,
    seeds: tuple[Int64, Int64] | None = None,
) -> Putative:
    """Reciprocal matches from some pixels of both images, on both decodes of a pair, with their 3D points.

    Args:
        orders: the prediction with the first image as the reference, and that with the second.
        first: encoding of the first image.
        second: encoding of the second image.
        seeds: pixels of what the network sees, row · width + column, of either image; None: a grid.
    """
    forward, backward = orders
    # The descriptors are let go of once they are matched; the points need much less.
    points_at = pair_points(orders)
    if seeds is None:
        step = max(grid_step(encoding.network_size) for encoding in (first, second))
        matches = match_predictions(forward, backward, step)
    else:
        matches = match_predictions(forward, backward, (torch.from_numpy(seeds[0]), torch.from_numpy(seeds[1])))
    index_first, index_second = matches.pairs.first.cpu().numpy(), matches.pairs.second.cpu().numpy()
    return Putative(
        xy_first=_grid_xy(index_first, first),
        xy_second=_grid_xy(index_second, second),
        confidence=matches.confidence.cpu().numpy(),
        points=lambda numbers: points_at(index_first[numbers], index_second[numbers]),
    )


def pair_points(orders: tuple[PairPrediction, PairPrediction]) -> PointsAt:
    """The 3D points of matched pixels, by both decodes of a pair; holds none of the descriptors."""
    forward, backward = orders
    first_points, shared_points, second_points = (
        view.points_at for view in (forward.first, forward.second, backward.first)
    )
    device = forward.first.descriptors.device

    def points_at(index_first: Int64, index_second: Int64) -> tuple[Float64, Float64]:
        first, second = (torch.from_numpy(index).to(device) for index in (index_first, index_second))
        own, shared = (_as_array(at(second)[0]) for at in (second_points, shared_points))
        # Each order has a scale of its own: the second view's points in its own frame take the first order's.
        scale = align_similarity_robust(own, shared)[0].scale if len(own) >= MIN_MATCHES else 1.0
        return _as_array(first_points(first)[0]), own * scale

    return points_at


def _as_array(points: torch.Tensor) -> Float64:
    array: Float64 = points.double().cpu().numpy()
    return array


def _grid_xy(index: Int64, encoding: Encoding) -> Float64:
    width = encoding.network_size[0]
    upright = np.stack([index % width, index // width], axis=1).astype(np.float64) + 0.5
    return encoding.transform.to_photo(upright) / encoding.transform.scale


def grid_step(size: tuple[int, int]) -> int:
    """Pixels from one seed to the next on an image of some width and height, for MAX_SEEDS of them at most."""
    width, height = size
    return next(
        step
        for step in count(1)
        if len(range(step // 2, height, step)) * len(range(step // 2, width, step)) <= MAX_SEEDS
    )
