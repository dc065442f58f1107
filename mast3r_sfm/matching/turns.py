"""Pairs judged together: where photos were taken from one point, a lone pair with depth among them is not believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components

from mast3r_sfm.types import PairMatches, Verdict

MIN_DEPTH_SHARE = 0.2
"""Matches of pairs with depth, over all matches between photos tied by pure rotations, below which depth is noise. In
a slow video, where neighbours also look like pure rotations, frames farther apart lift it far above."""


def settle_turns(matches: Sequence[PairMatches], num_images: int) -> list[PairMatches]:
    """Judge pairs with depth WEAK where nearly all evidence says that their photos share one centre.

    Args:
        matches: all edges of the view graph.
        num_images: how many images the indices run over.
    """
    turns = np.array([(m.first, m.second) for m in matches if m.verdict is Verdict.PURE_ROTATION], np.int64)
    turns = turns.reshape(-1, 2)
    shape = (num_images, num_images)
    graph = scipy.sparse.coo_array((np.ones(len(turns)), (turns[:, 0], turns[:, 1])), shape=shape)
    _, cluster = connected_components(graph, directed=False)
    turning, deep = np.zeros(num_images), np.zeros(num_images)
    for match in matches:
        if cluster[match.first] == cluster[match.second]:
            evidence = deep if match.verdict.has_depth else turning
            evidence[cluster[match.first]] += len(match)
    noise = deep < MIN_DEPTH_SHARE * (deep + turning)
    return [
        _without_matches(match)
        if match.verdict.has_depth and cluster[match.first] == cluster[match.second] and noise[cluster[match.first]]
        else match
        for match in matches
    ]


def _without_matches(match: PairMatches) -> PairMatches:
    none = np.zeros((0, 3))
    return replace(
        match,
        verdict=Verdict.WEAK,
        xy_first=none[:, :2],
        xy_second=none[:, :2],
        confidence=none[:, 0].astype(np.float32),
        points_first=none,
        points_second=none,
        second_from_first=np.eye(3, 4),
    )
