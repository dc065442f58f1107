"""Matches of a pair before any geometric check, from either kind of model, in network pixels."""

from __future__ import annotations

from collections.abc import Sequence
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

    encodings: Sequence[Encoding]
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
    """All matches of a pair, without their points."""
    return Putative(
        xy_first=np.concatenate([part.xy_first for part in parts]),
        xy_second=np.concatenate([part.xy_second for part in parts]),
        confidence=np.concatenate([part.confidence for part in parts]),
        is_distinct=np.concatenate([part.is_distinct for part in parts]),
        frames=parts[0].frames,
    )


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


def match_dense(orders: tuple[PairPrediction, PairPrediction], first: Encoding, second: Encoding) -> Putative:
    """Reciprocal matches from grids of pixels in both images, on both decodes of a pair, with their 3D points.

    Args:
        orders: the prediction with the first image as the reference, and that with the second.
        first: encoding of the first image.
        second: encoding of the second image.
    """
    forward, backward = orders
    # The descriptors are let go of once they are matched; the points need much less.
    views = [view.points_at for view in (forward.first, forward.second, backward.first, backward.second)]
    device = forward.first.descriptors.device
    step = max(_grid_step(view.descriptors) for view in (forward.first, forward.second))
    matches = match_predictions(forward, backward, step)
    index_first, index_second = matches.pairs.first.to(device), matches.pairs.second.to(device)

    def points(numbers: Int64) -> MatchedPoints:
        chosen = torch.from_numpy(numbers).to(device)
        pixels = index_first[chosen], index_second[chosen]
        return DecodedPoints(
            *(_as_array(at(index)[0]) for at, index in zip(views, (*pixels, *reversed(pixels)), strict=True))
        ).matched()

    return Putative(
        xy_first=_grid_xy(matches.pairs.first.cpu().numpy(), first),
        xy_second=_grid_xy(matches.pairs.second.cpu().numpy(), second),
        confidence=matches.confidence.cpu().numpy(),
        is_distinct=np.ones(len(matches.confidence), bool),
        points=points,
        frames=(shown(first), shown(second)),
    )


def _as_array(points: torch.Tensor) -> Float64:
    array: Float64 = points.double().cpu().numpy()
    return array


def _grid_xy(index: Int64, encoding: Encoding) -> Float64:
    width = encoding.network_size[0]
    upright = np.stack([index % width, index // width], axis=1).astype(np.float64) + 0.5
    return encoding.transform.to_photo(upright) / encoding.transform.scale


def _grid_step(descriptors: torch.Tensor) -> int:
    """Pixels from one seed to the next, for MAX_SEEDS of them at most."""
    height, width = descriptors.shape[:2]
    return next(
        step
        for step in count(1)
        if len(range(step // 2, height, step)) * len(range(step // 2, width, step)) <= MAX_SEEDS
    )
