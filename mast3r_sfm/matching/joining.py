"""Parts of a collection joined by pairs none of which is believed alone.

Two parts whose images are placed relative to each other are rigid but for one similarity between them. A pair of images
across gives all of it but two lengths. What a second pair, of other images, matches has only these left to agree with,
so that two pairs of a dozen matches each tell more than one of two dozen. By chance, each has a geometry of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import poselib
import scipy.optimize

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.rigid import angle_between_rotations
from mast3r_sfm.matching.calibrated import View
from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.matching.hard import MIN_AGREEING, MIN_AGREEING_SHARE
from mast3r_sfm.matching.weak_pairs import Part, Similarity, WeakPair, essential_matrix
from mast3r_sfm.types import Float64, Int64, PairMatches, Verdict

MAX_WEAK = 12
"""Weak pairs between two parts that are looked at, those of most evidence."""
MIN_FIRST = 6
"""Matches of a second pair that must agree with the first for both to be looked into."""
MAX_STARTS = 8
"""Two pairs that are looked into, those of which most agree."""
WIDENINGS = (3.0, 1.7, 1.0)
"""How much farther than a match that agrees those may be that a similarity is refined by, one step after the other."""
MAX_SIGMA_DEG = 1.5
RIVAL_DEG, RIVAL_SHARE = 10.0, 0.7
"""A similarity is not believed where matches leave its rotation open by MAX_SIGMA_DEG, or where one that is turned by
RIVAL_DEG or more agrees with RIVAL_SHARE of what it agrees with. Photos taken along a street, or from far away, have
true matches that say next to nothing: parts of such sets would be joined 35 to 140 degrees off with sigmas of 1.8 to 5,
or rivals of 0.86 and more; right ones have 1.3 and 0.51 at most."""
MIN_KEPT = 0.8
"""Share of what agrees with the confirmed pairs' own geometries that must agree with the similarity, too. Of wallpaper,
which looks alike in several places, it kept 0.78 at most; right ones keep 0.77 to 0.96."""
MAX_STEPS = 30
MIN_ITERATIONS, MAX_ITERATIONS = 100, 1000
LENGTHS = (0.02, 50.0)
"""Smallest and largest of what is solved for, a baseline and the scale of a part, over the spread of a part."""


def join_parts(
    parts: Sequence[Part], edges: Sequence[EpipolarEdge], views: Mapping[int, View], config: MatchConfig, seed: int
) -> dict[int, PairMatches]:
    """The pairs across parts that one similarity confirms together, by the numbers of their edges.

    A pair is confirmed by what confirms the slow matcher's: MIN_AGREEING distinct matches, and MIN_AGREEING_SHARE of
    all that it has. Two or more must be, of two or more images of either part.

    Args:
        parts: whose images are placed relative to each other; no image in two of them.
        edges: all checked pairs of keypoints.
        views: by image, with the focal lengths that the parts were placed with.
        config: thresholds.
        seed: of the sampling.
    """
    part_of = {int(image): number for number, part in enumerate(parts) for image in part.images}
    across: dict[tuple[int, int], list[int]] = {}
    for number, edge in enumerate(edges):
        one, two = part_of.get(edge.first, -1), part_of.get(edge.second, -1)
        if min(one, two) >= 0 and one != two and may_be_confirmed(edge):
            across.setdefault((min(one, two), max(one, two)), []).append(number)
    joined: dict[int, PairMatches] = {}
    for (one, two), numbers in sorted(across.items()):
        if len(numbers) < 2:
            continue
        # The part of a single image is the second, whose scale may be left open.
        first, second = sorted((parts[one], parts[two]), key=lambda part: -len(part.images))
        worth = {number: edges[number].num_inliers * edges[number].inlier_ratio ** 2 for number in numbers}
        chosen = sorted(numbers, key=lambda number: (-worth[number], number))[:MAX_WEAK]
        weak = [_weak_pair(number, edges[number], (first, second), views) for number in chosen]
        similarity = find_similarity(weak, config.max_epipolar_error_px, seed)
        if similarity is not None:
            joined |= {
                pair.number: _as_matches(pair, similarity, config.max_epipolar_error_px)
                for pair in _confirmed(weak, similarity, config.max_epipolar_error_px)
            }
    return joined


def may_be_confirmed(edge: EpipolarEdge) -> bool:
    """Whether a pair that is no link has as many matches as parts are joined by that agree with one geometry."""
    return not edge.verdict.is_link and edge.num_inliers >= max(MIN_AGREEING, MIN_AGREEING_SHARE * edge.num_putative)


def _weak_pair(number: int, edge: EpipolarEdge, parts: tuple[Part, Part], views: Mapping[int, View]) -> WeakPair:
    is_swapped = edge.first not in parts[0].images
    others = len(edge.rejected)
    images = edge.first, edge.second
    xy = (
        np.concatenate([edge.xy_first, edge.rejected[:, 0:2]]),
        np.concatenate([edge.xy_second, edge.rejected[:, 2:4]]),
    )
    if is_swapped:
        images, xy = images[::-1], xy[::-1]
    rows = [int(np.searchsorted(part.images, image)) for part, image in zip(parts, images, strict=True)]
    return WeakPair(
        number=number,
        images=images,
        rotation=(parts[0].rotation[rows[0]], parts[1].rotation[rows[1]]),
        centre=(parts[0].centre[rows[0]], parts[1].centre[rows[1]]),
        views=(views[images[0]], views[images[1]]),
        xy=xy,
        confidence=np.concatenate([edge.confidence, edge.rejected[:, 4]]),
        is_distinct=np.concatenate([edge.is_distinct, np.ones(others, np.bool_)]),
        is_own=np.concatenate([edge.is_distinct, np.zeros(others, np.bool_)]),
        num_putative=edge.num_putative,
        is_swapped=is_swapped,
        has_scale=len(parts[1].images) > 1,
    )


def find_similarity(weak: Sequence[WeakPair], max_error_px: float, seed: int) -> Similarity | None:
    """The similarity between two parts that confirms most matches of two pairs or more; None where none does.

    Args:
        weak: pairs across the parts.
        max_error_px: Sampson distance below which a match agrees.
        seed: of the sampling.
    """
    starts: list[tuple[int, Similarity]] = []
    for source in weak:
        others = [other for other in weak if _is_independent(source, other)]
        relative = _relative_pose(source, max_error_px, seed) if others else np.zeros((3, 4))
        starts += [
            start for other in others if (start := _from_two_pairs(source, relative, other, max_error_px)) is not None
        ]
    starts.sort(key=lambda start: -start[0])
    found = [_refined(weak, start, max_error_px) for _, start in starts[:MAX_STARTS]]
    agreeing = [sum(_agreeing(pair, similarity, max_error_px) for pair in weak) for similarity, _ in found]
    best = -1
    for row, (similarity, sigma_deg) in enumerate(found):
        confirmed = _confirmed(weak, similarity, max_error_px)
        kept = sum(_own_agreeing(pair, similarity, max_error_px) for pair in confirmed)
        stands = sigma_deg < MAX_SIGMA_DEG and kept >= max(MIN_KEPT * sum(map(_own, confirmed)), 1)
        if stands and (best < 0 or agreeing[row] > agreeing[best]):
            best = row
    if best < 0:
        return None
    for row, (similarity, _) in enumerate(found):
        turned = np.degrees(angle_between_rotations(similarity.rotation, found[best][0].rotation))
        if turned > RIVAL_DEG and agreeing[row] >= RIVAL_SHARE * agreeing[best]:
            return None
    return found[best][0]


def _is_independent(source: WeakPair, other: WeakPair) -> bool:
    """Whether the pairs are of different images of either part, of a part of one image but for that."""
    same_second = source.images[1] == other.images[1]
    return source.images[0] != other.images[0] and (not same_second or not source.has_scale)


def _own(pair: WeakPair) -> int:
    """Distinct matches that agree with the pair's own geometry."""
    return int(pair.is_own.sum())


def _own_agreeing(pair: WeakPair, similarity: Similarity, max_error_px: float) -> int:
    """Of these, how many the similarity agrees with."""
    return int((pair.judged(similarity, max_error_px).kept & pair.is_own).sum())


def _agreeing(pair: WeakPair, similarity: Similarity, max_error_px: float) -> int:
    return int((pair.judged(similarity, max_error_px).kept & pair.is_distinct).sum())


def _confirmed(weak: Sequence[WeakPair], similarity: Similarity, max_error_px: float) -> list[WeakPair]:
    """The pairs that the similarity confirms; none where they are of one image of a part that has several."""
    found = [
        pair
        for pair in weak
        if _agreeing(pair, similarity, max_error_px) >= max(MIN_AGREEING, MIN_AGREEING_SHARE * pair.num_putative)
    ]
    enough = len({pair.images[0] for pair in found}) > 1
    if found and found[0].has_scale:
        enough &= len({pair.images[1] for pair in found}) > 1
    return found if enough else []


def _relative_pose(pair: WeakPair, max_error_px: float, seed: int) -> Float64:
    """[3, 4] second camera from first, by the pair alone."""
    cameras = [view.pinhole.poselib_camera() for view in pair.views]
    xy = [places[pair.is_own] for places in pair.xy]
    options = {
        "max_epipolar_error": max_error_px,
        "min_iterations": MIN_ITERATIONS,
        "max_iterations": MAX_ITERATIONS,
        "seed": seed,
    }
    pose, _ = poselib.estimate_relative_pose(xy[0], xy[1], cameras[0], cameras[1], options)
    return np.column_stack([np.asarray(pose.R, np.float64), np.asarray(pose.t, np.float64)])


def _from_two_pairs(
    source: WeakPair, relative: Float64, other: WeakPair, max_error_px: float
) -> tuple[int, Similarity] | None:
    """All but two lengths from one pair's relative pose [3, 4], and those by which most matches of the other agree.

    With the number of these; None where they are fewer than MIN_FIRST.
    """
    back = source.rotation[0].T @ relative[:, :3].T
    rotation, baseline = back @ source.rotation[1], -back @ relative[:, 3]
    # The other pair's baseline is a fixed one, plus the length of this one, plus the scale of the second part.
    steps = np.array([source.centre[0] - other.centre[0], baseline, rotation @ (other.centre[1] - source.centre[1])])
    second_from_first = other.rotation[1] @ rotation.T @ other.rotation[0].T
    shifts = -steps @ (other.rotation[1] @ rotation.T).T
    essentials = np.array([essential_matrix(np.column_stack([second_from_first, shift])) for shift in shifts])
    lengths = _candidate_lengths(other.value(essentials)[:, other.is_distinct], has_scale=source.has_scale)
    if not len(lengths):
        return None
    summed = np.einsum("ci,ijk->cjk", np.column_stack([np.ones(len(lengths)), lengths]), essentials)
    agreeing = (np.abs(other.error(summed)[:, other.is_distinct]) < max_error_px).sum(axis=1)
    count = int(agreeing.max())
    if count < MIN_FIRST:
        return None
    length, scale = lengths[int(agreeing.argmax())].tolist()
    shift = source.centre[0] + length * baseline - scale * rotation @ source.centre[1]
    return count, Similarity(rotation=rotation, shift=shift, scale=scale)


def _candidate_lengths(values: Float64, *, has_scale: bool) -> Float64:
    """Lengths and scales [C, 2] by which a match, or two where a scale is to be found, agree exactly.

    Args:
        values: [3, M] what each match has of a fixed baseline, of one of length 1, and of a scale of 1.
        has_scale: otherwise it is 1.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if has_scale:
            one, two = np.array(list(combinations(range(values.shape[1]), 2)), np.int64).reshape(-1, 2).T
            (f1, l1, s1), (f2, l2, s2) = values[:, one], values[:, two]
            determinant = l1 * s2 - l2 * s1
            lengths, scale = (s1 * f2 - s2 * f1) / determinant, (l2 * f1 - l1 * f2) / determinant
        else:
            lengths, scale = -values[0] / values[1], np.ones(values.shape[1])
    found = np.column_stack([lengths, scale])
    return found[((found > LENGTHS[0]) & (found < LENGTHS[1])).all(axis=1)]


def _refined(weak: Sequence[WeakPair], start: Similarity, max_error_px: float) -> tuple[Similarity, float]:
    """The similarity that agrees best with the distinct matches near it, of all pairs, robustly.

    With the standard deviation of its rotation in degrees, for matches that err by a pixel; infinite where it is open.
    """
    found, sigma_deg = start, np.inf
    free = 7 if weak[0].has_scale else 6
    for widening in WIDENINGS:
        limit = widening * max_error_px
        near = [
            np.flatnonzero(pair.is_distinct & (np.abs(pair.error(essential_matrix(pair.pose(found)))) < limit))
            for pair in weak
        ]
        if sum(map(len, near)) < MIN_AGREEING:
            return found, np.inf

        def errors(values: Float64, near: Sequence[Int64] = near) -> Float64:
            similarity = Similarity.of(np.append(values, np.zeros(7 - free)))
            return np.concatenate(
                [
                    pair.error(essential_matrix(pair.pose(similarity)))[chosen]
                    for pair, chosen in zip(weak, near, strict=True)
                ]
            )

        solved = scipy.optimize.least_squares(
            errors, found.values[:free], loss="soft_l1", f_scale=max_error_px / 2, max_nfev=MAX_STEPS
        )
        found = Similarity.of(np.append(solved.x, np.zeros(7 - free)))
        jacobian = np.asarray(solved.jac, np.float64)
        covariance = np.linalg.pinv(jacobian.T @ jacobian, hermitian=True)
        sigma_deg = float(np.degrees(np.sqrt(np.trace(covariance[:3, :3]))))
    return found, sigma_deg


def _as_matches(pair: WeakPair, similarity: Similarity, max_error_px: float) -> PairMatches:
    judged = pair.judged(similarity, max_error_px)
    keep, pose = np.flatnonzero(judged.kept), judged.pose
    sides = [(pair.views[side].photo_xy(pair.xy[side][keep]), judged.points[side][keep]) for side in (0, 1)]
    if pair.is_swapped:
        sides = sides[::-1]
        pose = np.concatenate([pose[:, :3].T, -(pose[:, :3].T @ pose[:, 3])[:, None]], axis=1)
    first, second = pair.images[::-1] if pair.is_swapped else pair.images
    return PairMatches(
        first=first,
        second=second,
        xy_first=sides[0][0],
        xy_second=sides[1][0],
        confidence=pair.confidence[keep],
        points_first=sides[0][1],
        points_second=sides[1][1],
        verdict=Verdict.GOOD,
        inlier_ratio=int(pair.is_distinct[keep].sum()) / max(pair.num_putative, 1),
        second_from_first=pose,
    )
