"""The pairs on which the connection of a collection hangs, matched again with all that the model has.

Nearest neighbours find a few dozen "inliers" between any two photos, so that a thin link between two well connected
parts may be a true wide baseline as well as chance. The model's slow matcher tells: on photos of different places it
finds next to nothing, on wide baselines often several times as much. It is asked only where the answer decides which
parts belong together, and links that it does not confirm are not believed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components

from mast3r_sfm.geometry.epipolar import sampson_error
from mast3r_sfm.matching.check import EpipolarEdge, Putative, check_pair
from mast3r_sfm.matching.checker import Pair, PairChecker, Views
from mast3r_sfm.matching.putative import join_putative, network_xy, shown
from mast3r_sfm.matching.straight import PairLenses
from mast3r_sfm.models.base import KeypointModel
from mast3r_sfm.types import Bool, Int64, Verdict

STRONG_EVIDENCE = 15.0
"""Distinct inliers times the square of their share above which nearest neighbours are believed. Chance reaches 8.0
(1,300 pairs of photos of different places, benchmarks/chance_matches.py)."""
SMALL_PART = 8
"""Images of a strongly connected part below which its pairs, too, are worth a second look."""
MAX_ROUNDS = 8
SURE_INLIERS = 120
"""Inliers of the slow matcher above which it is believed. On objects that look alike from several sides (a statue, a
toy) it finds up to 116 between sides that share nothing."""
MIN_AGREEING, MIN_AGREEING_SHARE = 10, 0.33
"""How many of the distinct matches of nearest neighbours, and what share of them, confirm a geometry that has fewer:
with wrong ones, at most 0.29 agree, or fewer than nine matches."""
FRUITLESS_ROUNDS = 3
"""Rounds without a confirmed link after which the parts are taken to be separate."""
WELL_HELD = 3
"""Strong pairs of an image from which no other is needed to say where it was taken."""
MIN_SURE_SHARE = 0.5
"""Share of the slow matcher's matches that must agree for it to say better where such an image was taken. With less, it
confirms that two photos show the same place, but its geometry is often wrong."""
MIN_HOPE = 8
"""Distinct inliers of nearest neighbours from which the slow matcher is asked about a pair of a thinly held image."""

Rematch = Callable[[int], EpipolarEdge]


def match_hard_pair(
    checker: PairChecker, model: KeypointModel, pair: Pair, views: Views, nearest: Callable[[], Putative]
) -> EpipolarEdge:
    """Match and check one pair with the model's slow matcher.

    Args:
        checker: its settings and seed.
        model: has the slow matcher.
        pair: indices of the images.
        views: the model's encodings of both.
        nearest: gives what nearest neighbours match, where the slow matcher finds enough to ask. They have no say in
            the geometry, but unless it has SURE_INLIERS, the distinct ones among them must confirm it.
    """
    first, second = views
    index, confidence = model.match_hard(first, second)
    slow = Putative(
        xy_first=network_xy(first, first.transform.scale)[index[:, 0]],
        xy_second=network_xy(second, second.transform.scale)[index[:, 1]],
        confidence=confidence,
        is_distinct=np.ones(len(index), np.bool_),
        frames=(shown(first), shown(second)),
    )
    if len(index) < checker.config.min_inliers:
        return check_pair(pair, slow, checker.config, checker.seed)
    others = nearest()
    silent = replace(others, is_distinct=np.zeros(len(others.xy_first), np.bool_))
    lenses = PairLenses.of(pair, views, checker.lenses)
    joined = lenses.straighten(join_putative([slow, silent]))
    edge = check_pair(pair, joined, checker.config, checker.seed, crowd=1.0)
    if not edge.verdict.is_link or edge.num_inliers >= SURE_INLIERS:
        return edge
    distinct = lenses.straighten(others.subset(others.is_distinct))
    error = sampson_error(edge.fundamental, distinct.xy_first, distinct.xy_second)
    agreeing = int((error < checker.config.max_epipolar_error_px).sum())
    confirmed = agreeing >= max(MIN_AGREEING, MIN_AGREEING_SHARE * len(error))
    return edge if confirmed else replace(edge, verdict=Verdict.WEAK)


def hanging_pairs(edges: Sequence[EpipolarEdge], num_images: int) -> list[int]:
    """Numbers of the pairs within small parts, or between parts, of those that strong edges connect; none if all images
    are one part."""
    part = strong_parts(edges, num_images)
    size = np.bincount(part)
    if len(size) < 2:
        return []
    return [
        number
        for number, edge in enumerate(edges)
        if part[edge.first] != part[edge.second] or size[part[edge.first]] < SMALL_PART
    ]


def settle_hanging_pairs(
    edges: Sequence[EpipolarEdge], num_images: int, rematch: Rematch, pool: Executor
) -> list[EpipolarEdge]:
    """Rematch pairs between parts that are not strongly connected, until they are joined or found to be separate; then
    doubtful pairs of images that few strong ones hold.

    Args:
        edges: all checked pairs.
        num_images: how many images the indices run over.
        rematch: gives the edge of that number anew, by the slow matcher.
        pool: where it runs.

    Returns:
        the edges in the same order: rematched ones replaced, and thin links between parts that nothing confirms judged
        WEAK.
    """
    settled = list(edges)
    tried = np.zeros(len(edges), bool)
    strong = _are_strong(edges)
    fruitless = 0
    for _ in range(MAX_ROUNDS):
        part = _parts(settled, strong, num_images)
        chosen = _most_promising(settled, part, tried)
        if not chosen or fruitless == FRUITLESS_ROUNDS:
            break
        confirmed = False
        for number, edge in zip(chosen, pool.map(rematch, chosen), strict=True):
            # What nearest neighbours found is all that there is where the slow matcher finds nothing.
            settled[number] = edge if edge.verdict.is_link else replace(settled[number], verdict=edge.verdict)
            tried[number] = True
            strong[number] = edge.verdict.is_link
            confirmed |= bool(strong[number])
        fruitless = 0 if confirmed else fruitless + 1
    settled = _without_links_between(settled, _parts(settled, strong, num_images))
    # An image with one or two strong pairs is pulled about by its doubtful ones.
    chosen = _of_thinly_held(settled, strong, tried, num_images)
    for number, edge in zip(chosen, pool.map(rematch, chosen), strict=True):
        if edge.verdict.is_link and edge.inlier_ratio >= MIN_SURE_SHARE:
            settled[number] = edge
    return settled


def weaken_hanging_links(edges: Sequence[EpipolarEdge], num_images: int) -> list[EpipolarEdge]:
    """The edges with links between parts that no strong edge connects judged WEAK, where nothing can confirm them."""
    return _without_links_between(edges, strong_parts(edges, num_images))


def _without_links_between(edges: Sequence[EpipolarEdge], part: Int64) -> list[EpipolarEdge]:
    return [
        replace(edge, verdict=Verdict.WEAK) if edge.verdict.is_link and part[edge.first] != part[edge.second] else edge
        for edge in edges
    ]


def strong_parts(edges: Sequence[EpipolarEdge], num_images: int) -> Int64:
    """The part [N] of each image, of those that strong edges connect."""
    return _parts(edges, _are_strong(edges), num_images)


def _are_strong(edges: Sequence[EpipolarEdge]) -> Bool:
    return np.array([evidence(edge) >= STRONG_EVIDENCE for edge in edges], np.bool_)


def evidence(edge: EpipolarEdge) -> float:
    """Distinct inliers times the square of their share; 0 of a pair that is no link."""
    return edge.num_inliers * edge.inlier_ratio**2 if edge.verdict.is_link else 0.0


def _parts(edges: Sequence[EpipolarEdge], strong: Bool, num_images: int) -> Int64:
    pairs = np.array([(edge.first, edge.second) for edge in edges], np.int64).reshape(-1, 2)[strong]
    graph = scipy.sparse.coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(num_images,) * 2)
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _most_promising(edges: Sequence[EpipolarEdge], part: Int64, tried: Bool) -> list[int]:
    """For every part, the untried pair with another part that has most inliers; ascending, each once."""
    best: dict[int, int] = {}
    for number, edge in enumerate(edges):
        ends = int(part[edge.first]), int(part[edge.second])
        if ends[0] == ends[1] or tried[number]:
            continue
        for end in ends:
            if end not in best or edge.num_inliers > edges[best[end]].num_inliers:
                best[end] = number
    return sorted(set(best.values()))


def _of_thinly_held(edges: Sequence[EpipolarEdge], strong: Bool, tried: Bool, num_images: int) -> list[int]:
    """Of every image with few strong pairs, the doubtful ones with most inliers; ascending, each once."""
    ends = np.array([(edge.first, edge.second) for edge in edges], np.int64).reshape(-1, 2)
    held = np.bincount(ends[strong].ravel(), minlength=num_images)
    inliers = np.array([edge.num_inliers for edge in edges], np.int64)
    doubtful = ~strong & ~tried & (inliers >= MIN_HOPE)
    chosen: set[int] = set()
    for image in np.flatnonzero((held > 0) & (held < WELL_HELD)):
        own = np.flatnonzero(doubtful & (ends == image).any(axis=1))
        chosen.update(own[np.argsort(-inliers[own], kind="stable")][:WELL_HELD].tolist())
    return sorted(chosen)
