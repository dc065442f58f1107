"""One keypoint set per image, shared by all its pairs, so that matches join into tracks over many images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.types import Float64, PairMatches

Indices = dict[tuple[int, int], NDArray[np.uint32]]


def share_keypoints(matches: Sequence[PairMatches], num_images: int) -> tuple[list[Float64], Indices]:
    """Gather the matched pixels of every image; the same pixel in two pairs is one keypoint.

    Args:
        matches: verified pairs.
        num_images: how many images the indices run over.

    Returns:
        keypoints [K, 2] in photo pixels per image, sorted by x then y; keypoint indices [M, 2] of every pair, each
        keypoint used at most once in a pair.
    """
    sides: list[list[tuple[int, int, Float64]]] = [[] for _ in range(num_images)]
    for pair, match in enumerate(matches):
        sides[match.first].append((pair, 0, match.xy_first))
        sides[match.second].append((pair, 1, match.xy_second))
    keypoints: list[Float64] = []
    columns = [np.zeros((len(match), 2), np.uint32) for match in matches]
    for image in sides:
        # float32, as the database stores them: what is one number there is one keypoint.
        stacked = np.concatenate([xy for _, _, xy in image] or [np.zeros((0, 2))]).astype(np.float32)
        unique, inverse = np.unique(stacked, axis=0, return_inverse=True)
        keypoints.append(unique.astype(np.float64))
        start = 0
        for pair, side, xy in image:
            columns[pair][:, side] = inverse.ravel()[start : start + len(xy)]
            start += len(xy)
    return keypoints, {
        (match.first, match.second): _one_to_one(columns[pair], match) for pair, match in enumerate(matches)
    }


def _one_to_one(indices: NDArray[np.uint32], match: PairMatches) -> NDArray[np.uint32]:
    """Of several matches of one keypoint, the most confident."""
    kept = np.argsort(-match.confidence, kind="stable")
    for side in (0, 1):
        kept = kept[np.unique(indices[kept, side], return_index=True)[1]]
        kept = kept[np.argsort(-match.confidence[kept], kind="stable")]
    return indices[np.sort(kept)]
