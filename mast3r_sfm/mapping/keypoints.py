"""One keypoint set per image, shared by all its pairs, so that matches join into tracks over many images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from mast3r_sfm.types import Bool, Float64, Int64, PairMatches, Usable

Indices = dict[tuple[int, int], NDArray[np.uint32]]
_NONE: Float64 = np.zeros((0, 2))
_LEAST = 1e-3
"""Weight of a pixel that only matches without confidence name."""


def share_keypoints(
    matches: Sequence[PairMatches],
    num_images: int,
    radius_px: float = 0.0,
    *,
    split: bool = True,
    usable: Usable | None = None,
) -> tuple[list[Float64], Indices]:
    """Gather the matched pixels of every image, and join the matches to tracks that see each image once.

    Pixels of an image that lie within `radius_px` of the most confident among them become one keypoint, at their mean,
    weighted by the confidence of their matches; where a mask hides the mean, at the most confident. Of matches that
    would give one image two keypoints in a track, the less confident are dropped, so that such a track falls into
    parts.

    Args:
        matches: verified pairs.
        num_images: how many images the indices run over.
        radius_px: photo pixels.
        split: whether contradictions are resolved here, by confidence, rather than by the geometry of the model.
        usable: where keypoints may lie; None: everywhere.

    Returns:
        keypoints [K, 2] in photo pixels per image, sorted by x then y, no two within `radius_px`; keypoint indices
        [M, 2] of every pair, each keypoint used at most once in a pair.
    """
    sides: list[list[tuple[int, int]]] = [[] for _ in range(num_images)]
    for pair, match in enumerate(matches):
        sides[match.first].append((pair, 0))
        sides[match.second].append((pair, 1))
    keypoints: list[Float64] = []
    columns = [np.zeros((len(match), 2), np.uint32) for match in matches]
    for number, image in enumerate(sides):
        xy = [(matches[pair].xy_first, matches[pair].xy_second)[side] for pair, side in image]
        weight: list[Float64] = [matches[pair].confidence.astype(np.float64) for pair, _ in image]
        places, place = _gather(
            np.concatenate([_NONE, *xy]),
            np.concatenate([_NONE[:, 0], *weight]),
            radius_px,
            partial(usable, number) if usable else None,
        )
        keypoints.append(places)
        start = 0
        for (pair, side), one in zip(image, xy, strict=True):
            columns[pair][:, side] = place[start : start + len(one)]
            start += len(one)
    kept = [_one_to_one(columns[pair], match) for pair, match in enumerate(matches)]
    sizes = np.array([len(xy) for xy in keypoints], np.int64)
    consistent = _split_tracks(matches, columns, kept, sizes) if split else kept
    return keypoints, {
        (match.first, match.second): columns[pair][consistent[pair]] for pair, match in enumerate(matches)
    }


def _gather(
    xy: Float64, confidence: Float64, radius_px: float, usable: Callable[[Float64], Bool] | None
) -> tuple[Float64, Int64]:
    """Keypoints [K, 2] that stand for pixels [M, 2], and the keypoint [M] of each."""
    # float32, as the database stores them: what is one number there is one keypoint.
    places, place = _unique_places(xy)
    weight: Float64 = np.bincount(place, np.maximum(confidence, _LEAST), minlength=len(places)).astype(np.float64)
    # Means of two groups may come closer than their members were; then these become one as well.
    while radius_px > 0 and len(near := cKDTree(places).query_pairs(radius_px, output_type="ndarray")):
        group = _groups(weight, near)
        total = np.bincount(group, weight)
        mean = np.stack([np.bincount(group, weight * places[:, axis]) / total for axis in (0, 1)], axis=1)
        if usable is not None:
            hidden = ~usable(mean)
            mean[hidden] = places[_heaviest(group, weight)[hidden]]
        places, again = _unique_places(mean)
        group = again[group]
        weight, place = np.bincount(group, weight, minlength=len(places)).astype(np.float64), group[place]
    return places, place


def _unique_places(xy: Float64) -> tuple[Float64, Int64]:
    """The different places [K, 2] of [M, 2] as float32, sorted by x then y, and which of them each is [M]."""
    # Complex numbers are ordered like that, and sorted many times as fast as rows.
    numbers = np.ascontiguousarray(xy, np.float32).view(np.complex64).ravel()
    unique, place = np.unique(numbers, return_inverse=True)
    return unique.view(np.float32).reshape(-1, 2).astype(np.float64), np.asarray(place, np.int64)


def _heaviest(group: Int64, weight: Float64) -> Int64:
    """[G] the member of most weight of each group."""
    order = np.lexsort((-weight, group))
    return order[np.r_[True, np.diff(group[order]) > 0]]


def _groups(weight: Float64, near: Int64) -> Int64:
    """The group [K] of each place: the heaviest gathers its neighbours, then the heaviest that is left, and so on.

    Args:
        weight: [K] of the places.
        near: [E, 2] places that are neighbours.
    """
    rank = np.empty(len(weight), np.int64)
    rank[np.argsort(-weight, kind="stable")] = np.arange(len(weight))
    both = np.concatenate([near, near[:, ::-1]])
    free, is_centre = np.ones(len(weight), np.bool_), np.zeros(len(weight), np.bool_)
    while free.any():
        some = both[free[both].all(axis=1)]
        best = np.where(free, rank, len(weight))
        np.minimum.at(best, some[:, 0], rank[some[:, 1]])
        centre = free & (best == rank)
        is_centre |= centre
        free &= ~centre
        free[some[centre[some[:, 1]], 0]] = False
    group = np.where(is_centre, rank, len(weight))
    joining = both[is_centre[both[:, 1]]]
    np.minimum.at(group, joining[:, 0], rank[joining[:, 1]])
    return np.asarray(np.unique(group, return_inverse=True)[1], np.int64)


def _one_to_one(indices: NDArray[np.uint32], match: PairMatches) -> Int64:
    """Of several matches of one keypoint, the most confident; ascending."""
    kept = np.argsort(-match.confidence, kind="stable")
    for side in (0, 1):
        kept = kept[np.unique(indices[kept, side], return_index=True)[1]]
        kept = kept[np.argsort(-match.confidence[kept], kind="stable")]
    return np.sort(kept)


def _split_tracks(
    matches: Sequence[PairMatches], columns: Sequence[NDArray[np.uint32]], kept: Sequence[Int64], sizes: Int64
) -> list[Int64]:
    """The matches of each pair that remain when no track may hold two keypoints of one image.

    Args:
        matches: pairs.
        columns: [M, 2] keypoint indices of each pair's matches.
        kept: of each pair, the matches that are in question.
        sizes: [N] keypoints of each image.
    """
    start = np.cumsum(sizes) - sizes
    nodes = [
        columns[pair][kept[pair]].astype(np.int64) + start[[match.first, match.second]]
        for pair, match in enumerate(matches)
    ]
    ends = np.concatenate([np.zeros((0, 2), np.int64), *nodes])
    confidence = np.concatenate([np.zeros(0), *(match.confidence[kept[pair]] for pair, match in enumerate(matches))])
    shape = (int(sizes.sum()),) * 2
    _, track = connected_components(coo_array((np.ones(len(ends)), ends.T), shape=shape), directed=False)
    image = np.repeat(np.arange(len(sizes)), sizes)
    seen, which, times = np.unique(track * len(sizes) + image, return_inverse=True, return_counts=True)
    contradictory = np.zeros(shape[0], np.bool_)
    contradictory[seen[times > 1] // len(sizes)] = True
    good = ~contradictory[track[ends[:, 0]]] if len(ends) else np.zeros(0, np.bool_)
    doubtful = np.flatnonzero(~good)
    # Within a track, its images are counted from 0.
    number = which - np.searchsorted(seen, track * len(sizes))
    good[doubtful] = _join_greedily(ends[doubtful], confidence[doubtful], number)
    parts = np.split(good, np.cumsum([len(rows) for rows in kept])[:-1]) if len(kept) else []
    return [rows[part] for rows, part in zip(kept, parts, strict=True)]


def _join_greedily(ends: Int64, confidence: Float64, image: Int64) -> Bool:
    """Which matches [M] hold together tracks without contradiction, if the most confident are believed first.

    Args:
        ends: [M, 2] the keypoints that they join.
        confidence: [M].
        image: of every keypoint; small numbers, which need be different within a track only.
    """
    good = np.zeros(len(ends), np.bool_)
    nodes, compact = np.unique(ends, return_inverse=True)
    owner, images = list(range(len(nodes))), [1 << number for number in image[nodes].tolist()]
    # Of equal ones the first by its keypoints, whatever the order of the pairs.
    order = np.lexsort((ends[:, 1], ends[:, 0], -confidence))
    firsts, seconds = compact.reshape(-1, 2)[order].T.tolist()
    for row, one, other in zip(order.tolist(), firsts, seconds, strict=True):
        first, second = _owner_of(one, owner), _owner_of(other, owner)
        if first == second:
            good[row] = True
        elif not images[first] & images[second]:
            good[row] = True
            owner[second] = first
            images[first] |= images[second]
    return good


def _owner_of(node: int, owner: list[int]) -> int:
    """What stands for all that a node was joined to; the way there becomes shorter."""
    while owner[node] != node:
        owner[node] = node = owner[owner[node]]
    return node
