"""Matches of a pair before any geometric check, from either kind of model, in network pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from mast3r_sfm.matching.check import MatchedPoints, Putative
from mast3r_sfm.matching.decodes import DecodedPoints
from mast3r_sfm.matching.nearest import mutual_nearest
from mast3r_sfm.matching.reciprocal import match_predictions
from mast3r_sfm.types import Encoding, Float64, Int64, PairPrediction

MAX_SEEDS = 4096
"""Pixels of an image from which matches are sought, at most."""


@dataclass(frozen=True, kw_only=True)
class KeypointSource:
    """One kind of keypoints of all images, and what makes two of them a match."""

    encodings: Sequence[Encoding] | Mapping[int, Encoding]
    """By image."""
    min_similarity: float
    """Cosine below which two descriptors are not a match."""
    max_ratio: float
    """Ratio to the distance of the second nearest above which a match is not distinct."""


def match_keypoints(
    views: tuple[Encoding, Encoding], source: KeypointSource, pixels: tuple[Encoding, Encoding]
) -> Putative:
    """Mutual nearest neighbours among the keypoints of two images.

    Args:
        views: the keypoints of both images.
        source: where they come from.
        pixels: the model's encodings of both images, in whose network pixels the matches are given.
    """
    first, second = views
    found = mutual_nearest(_descriptors(first), _descriptors(second), source.min_similarity)
    return Putative(
        xy_first=network_xy(first, pixels[0].transform.scale)[found.pairs[:, 0]],
        xy_second=network_xy(second, pixels[1].transform.scale)[found.pairs[:, 1]],
        # In the same measure for all kinds of keypoints: 1 for a match without rival, 0 where it ceases to be distinct.
        confidence=1 - found.ratio / np.float32(source.max_ratio),
        is_distinct=found.ratio < source.max_ratio,
        frames=(shown(pixels[0]), shown(pixels[1])),
    )


def join_putative(parts: Sequence[Putative]) -> Putative:
    """All matches of a pair, each once, without their points; of equal ones, that of the earliest part."""
    xy = np.concatenate([np.concatenate([part.xy_first, part.xy_second], axis=1) for part in parts])
    _, kept = np.unique(xy, axis=0, return_index=True)
    return Putative(
        xy_first=xy[:, :2],
        xy_second=xy[:, 2:],
        confidence=np.concatenate([part.confidence for part in parts]),
        is_distinct=np.concatenate([part.is_distinct for part in parts]),
        frames=parts[0].frames,
    ).subset(np.sort(kept))


def _descriptors(encoding: Encoding) -> torch.Tensor:
    return torch.from_numpy(encoding.tokens.astype(np.float32))


def network_xy(encoding: Encoding, scale: float) -> Float64:
    """Stored photo pixels scaled to the network's size, so that one camera's pixels keep one frame.

    Unlike `transform.to_network`, EXIF orientation is not applied: intrinsics belong to the stored pixels.
    """
    return encoding.xy.astype(np.float64) / scale


def shown(encoding: Encoding) -> Float64:
    """[2, 2] the first and the last corner of what the network saw, in the pixels of `network_xy`."""
    corners = encoding.transform.to_photo(np.array([[0, 0], encoding.network_size], np.float64))
    frame: Float64 = np.sort(corners, axis=0) / encoding.transform.scale
    return frame


def nearest_pixels(xy: Float64, encoding: Encoding) -> Int64:
    """Photo pixels [M, 2] to the nearest ones [M] of what the network saw of the whole photo, row · width + column."""
    width, height = encoding.network_size
    column, row = np.floor(encoding.transform.to_network(xy)).astype(np.int64).T
    index: Int64 = row.clip(0, height - 1) * width + column.clip(0, width - 1)
    return index


PointsAt = Callable[[Int64, Int64], MatchedPoints]
"""Pixels [M] of the first and of the second image (row · width + column) to the 3D points that they show."""


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
        is_distinct=np.ones(len(index_first), np.bool_),
        points=lambda numbers: points_at(index_first[numbers], index_second[numbers]),
        frames=(shown(first), shown(second)),
    )


def pair_points(orders: tuple[PairPrediction, PairPrediction]) -> PointsAt:
    """The 3D points of matched pixels, by both decodes of a pair; holds none of the descriptors."""
    forward, backward = orders
    views = [view.points_at for view in (forward.first, forward.second, backward.first, backward.second)]
    device = forward.first.descriptors.device

    def points_at(index_first: Int64, index_second: Int64) -> MatchedPoints:
        pixels = torch.from_numpy(index_first).to(device), torch.from_numpy(index_second).to(device)
        return DecodedPoints(
            *(_as_array(at(index)[0]) for at, index in zip(views, (*pixels, *reversed(pixels)), strict=True))
        ).matched()

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
