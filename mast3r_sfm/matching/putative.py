"""Matches of a pair before any geometric check, from either kind of model, in network pixels."""

from __future__ import annotations

import numpy as np
import torch

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.similarity import align_similarity_robust
from mast3r_sfm.matching.check import Putative
from mast3r_sfm.matching.nearest import ROWS_PER_BLOCK, mutual_nearest
from mast3r_sfm.types import Encoding, Float64, Int64, PairPrediction

MAX_SEEDS = 4096
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


def match_dense(orders: tuple[PairPrediction, PairPrediction], first: Encoding, second: Encoding) -> Putative:
    """Reciprocal nearest neighbours of a grid of pixels, on both decodes of a pair, with their 3D points.

    Args:
        orders: the prediction with the first image as the reference, and that with the second.
        first: encoding of the first image.
        second: encoding of the second image.
    """
    forward, backward = orders
    device = forward.first.descriptors.device
    # The descriptors are let go of once they are matched; the points need much less.
    points_of = {
        "first": forward.first.points_at,
        "shared": forward.second.points_at,
        "second": backward.first.points_at,
    }
    rows_first, rows_second = _reciprocal(forward)
    # The second order sees the pair swapped.
    swapped_second, swapped_first = _reciprocal(backward)
    both = np.concatenate([rows_first, swapped_first]), np.concatenate([rows_second, swapped_second])
    pairs = np.unique(np.stack(both, axis=1), axis=0)
    index_first, index_second = (torch.from_numpy(pairs[:, side]) for side in range(2))
    index_first, index_second = index_first.to(device), index_second.to(device)
    confidence = torch.sqrt(
        forward.first.descriptor_confidence.flatten()[index_first]
        * forward.second.descriptor_confidence.flatten()[index_second]
    )

    def points(numbers: Int64) -> tuple[Float64, Float64]:
        chosen = torch.from_numpy(numbers).to(device)
        found = {
            name: points_at((index_first if name == "first" else index_second)[chosen])[0].double().cpu().numpy()
            for name, points_at in points_of.items()
        }
        # Each order has a scale of its own: the second view's points in its own frame take the first order's.
        fit = align_similarity_robust(found["second"], found["shared"])[0] if len(numbers) >= MIN_MATCHES else None
        return found["first"], found["second"] * (fit.scale if fit else 1.0)

    return Putative(
        xy_first=_grid_xy(pairs[:, 0], first),
        xy_second=_grid_xy(pairs[:, 1], second),
        confidence=confidence.float().cpu().numpy(),
        points=points,
    )


def _grid_xy(index: Int64, encoding: Encoding) -> Float64:
    width = encoding.network_size[0]
    upright = np.stack([index % width, index // width], axis=1).astype(np.float64) + 0.5
    return encoding.transform.to_photo(upright) / encoding.transform.scale


@torch.inference_mode()
def _reciprocal(prediction: PairPrediction) -> tuple[Int64, Int64]:
    """Flat pixel indices of matches: grid pixels of one view that come back to themselves, for either view."""
    first, second = (view.descriptors.flatten(0, 1) for view in (prediction.first, prediction.second))
    euclidean = prediction.euclidean
    seeds_first, seeds_second = _seeds(prediction.first.descriptors), _seeds(prediction.second.descriptors)
    there = _nearest(first[seeds_first], second, euclidean)
    stays = _nearest(second[there], first, euclidean) == seeds_first
    back = _nearest(second[seeds_second], first, euclidean)
    returns = _nearest(first[back], second, euclidean) == seeds_second
    return (
        torch.cat([seeds_first[stays], back[returns]]).cpu().numpy(),
        torch.cat([there[stays], seeds_second[returns]]).cpu().numpy(),
    )


def _seeds(descriptors: torch.Tensor) -> torch.Tensor:
    height, width = descriptors.shape[:2]
    step = max(1, int(np.ceil(np.sqrt(height * width / MAX_SEEDS))))
    rows = torch.arange(step // 2, height, step, device=descriptors.device)
    columns = torch.arange(step // 2, width, step, device=descriptors.device)
    return (rows[:, None] * width + columns).flatten()


def _nearest(queries: torch.Tensor, database: torch.Tensor, euclidean: bool) -> torch.Tensor:
    # |q - d|² = |q|² - 2 (q·d - |d|² / 2), and |q|² is the same for all.
    half = database.square().sum(dim=1) / 2 if euclidean else database.new_zeros(())
    blocks = [
        (queries[start : start + ROWS_PER_BLOCK] @ database.T - half).argmax(dim=1)
        for start in range(0, len(queries), ROWS_PER_BLOCK)
    ]
    return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.int64, device=database.device)
