"""Matches of a pair before any geometric check, from either kind of model, in network pixels."""

from __future__ import annotations

import numpy as np
import torch

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.similarity import align_similarity_robust
from mast3r_sfm.matching.check import Putative
from mast3r_sfm.matching.nearest import ROWS_PER_BLOCK, mutual_nearest
from mast3r_sfm.models.base import DenseModel
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


def match_dense(model: DenseModel, first: Encoding, second: Encoding) -> Putative:
    """Reciprocal nearest neighbours of a grid of pixels, on both decodes of the pair, with their 3D points.

    Args:
        model: decodes the pair in both orders.
        first: encoding of the first image.
        second: encoding of the second image.
    """
    forward, backward = model.predict(first, second), model.predict(second, first)
    rows_first, rows_second = _reciprocal(forward)
    # The second order sees the pair swapped.
    swapped_second, swapped_first = _reciprocal(backward)
    both = np.concatenate([rows_first, swapped_first]), np.concatenate([rows_second, swapped_second])
    pairs = np.unique(np.stack(both, axis=1), axis=0)
    index_first, index_second = torch.from_numpy(pairs[:, 0]), torch.from_numpy(pairs[:, 1])
    quality = torch.sqrt(
        _flat(forward.descriptor_confidence[0])[index_first] * _flat(forward.descriptor_confidence[1])[index_second]
    )
    # Each order has a scale of its own: the second view's points in its own frame take the first order's.
    own = _points(backward, 0, index_second)
    shared = _points(forward, 1, index_second)
    scale = align_similarity_robust(own, shared)[0].scale if len(pairs) >= MIN_MATCHES else 1.0
    width_first = forward.descriptors.shape[2]
    return Putative(
        xy_first=_grid_xy(pairs[:, 0], width_first, first),
        xy_second=_grid_xy(pairs[:, 1], width_first, second),
        confidence=quality.float().cpu().numpy(),
        points_first=_points(forward, 0, index_first),
        points_second=own * scale,
    )


def _flat(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, *value.shape[2:])


def _points(prediction: PairPrediction, view: int, index: torch.Tensor) -> Float64:
    points: Float64 = _flat(prediction.points_in_first[view])[index].double().cpu().numpy()
    return points


def _grid_xy(index: Int64, width: int, encoding: Encoding) -> Float64:
    upright = np.stack([index % width, index // width], axis=1).astype(np.float64) + 0.5
    return encoding.transform.to_photo(upright) / encoding.transform.scale


@torch.inference_mode()
def _reciprocal(prediction: PairPrediction) -> tuple[Int64, Int64]:
    """Flat pixel indices of matches: grid pixels of the first view that come back to themselves, and the other way."""
    first, second = _flat(prediction.descriptors[0]), _flat(prediction.descriptors[1])
    height, width = prediction.descriptors.shape[1:3]
    step = max(1, int(np.ceil(np.sqrt(height * width / MAX_SEEDS))))
    rows = torch.arange(step // 2, height, step)
    columns = torch.arange(step // 2, width, step)
    seeds = (rows[:, None] * width + columns).flatten()
    there = _nearest(first[seeds], second)
    stays = _nearest(second[there], first) == seeds
    back = _nearest(second[seeds], first)
    returns = _nearest(first[back], second) == seeds
    return (
        torch.cat([seeds[stays], back[returns]]).cpu().numpy(),
        torch.cat([there[stays], seeds[returns]]).cpu().numpy(),
    )


def _nearest(queries: torch.Tensor, database: torch.Tensor) -> torch.Tensor:
    blocks = [
        (queries[start : start + ROWS_PER_BLOCK] @ database.T).argmax(dim=1)
        for start in range(0, len(queries), ROWS_PER_BLOCK)
    ]
    return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.int64)
