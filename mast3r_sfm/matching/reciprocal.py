"""Fast reciprocal matching of two dense descriptor maps (Leroy, Cabon, Revaud, MASt3R, 2024, section 3.3).

Pixels of one map go to their nearest neighbour in the other map, from there back to the first, and so on. A pixel that
comes back to itself is one of two that are each other's nearest: a match. A sparse grid of start pixels finds most of
the places where dense reciprocal matches lie, and prefers those that many pixels are drawn to.

Pixels are numbers row · W + column. Matches are unique and ordered by the pixel in the first map, then by that in the
second. Of equally near neighbours the one with the lowest number counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.matching.blocks import DescriptorMap
from mast3r_sfm.types import PairPrediction

Start = int | tuple[Tensor, Tensor]
"""Where matches are sought from: the step of a grid of pixels in both maps, or pixels [K] of either."""

ROUNDS = 10
"""Round trips after which a pixel that still moves is given up."""


class SearchableMap(Protocol):
    """A descriptor map in which nearest neighbours are found: `DescriptorMap`, or the exhaustive `PlainMap`."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""

    @property
    def features(self) -> Tensor:
        """[N, D], row by row."""

    def nearest(self, queries: Tensor, guess: Tensor | None = None) -> Tensor:
        """Nearest pixels [Q] of queries [Q, D]; the first of equally near ones."""


@dataclass(frozen=True, kw_only=True)
class PixelPairs:
    """Pixels of a first map and their partners in a second."""

    first: Tensor
    """[M] int64."""
    second: Tensor
    """[M] int64."""

    def __post_init__(self) -> None:
        if self.first.ndim != 1 or self.first.shape != self.second.shape:
            raise ShapeError(f"PixelPairs: {tuple(self.first.shape)} and {tuple(self.second.shape)} must both be [M]")

    def __len__(self) -> int:
        return len(self.first)

    @property
    def swapped(self) -> PixelPairs:
        """The same pairs with the maps in the other order."""
        return PixelPairs(first=self.second, second=self.first)

    @classmethod
    def join(cls, parts: Sequence[PixelPairs]) -> PixelPairs:
        """All pairs of all parts, one part after the other."""
        return cls(
            first=torch.cat([part.first for part in parts]),
            second=torch.cat([part.second for part in parts]),
        )

    def unique(self) -> tuple[PixelPairs, Tensor]:
        """Each pair once, ordered by `first`, then `second`; and the place [M] at which each came first."""
        if len(self) == 0:
            return self, self.first
        width = self.second.max() + 1
        ordered, place = (self.first * width + self.second).sort(stable=True)
        starts = torch.ones_like(ordered, dtype=torch.bool)
        starts[1:] = ordered[1:] != ordered[:-1]
        occurrence = place[starts]
        return PixelPairs(first=self.first[occurrence], second=self.second[occurrence]), occurrence


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """What reciprocal search found."""

    pairs: PixelPairs
    """Matches, unique and in order."""
    basin: Tensor
    """[N] for each pixel of the first map that was visited the pixel to which it came back; -1 elsewhere."""


@dataclass(frozen=True, kw_only=True)
class FusedMatches:
    """Matches of a pair of images and how far they are to be trusted."""

    pairs: PixelPairs
    """Unique and in order."""
    confidence: Tensor
    """[M]."""


def grid_seeds(size: tuple[int, int], step: int, device: torch.device | None = None) -> Tensor:
    """Pixels [K] of the rows and columns step // 2, step // 2 + step, … of a map of some height and width."""
    rows, columns = (torch.arange(min(step // 2, side), side, step, device=device) for side in size)
    return (rows[:, None] * size[1] + columns).flatten()


@torch.inference_mode()
def find_reciprocal(first: SearchableMap, second: SearchableMap, seeds: Tensor, *, rounds: int = ROUNDS) -> Convergence:
    """Follow nearest neighbours from the first map to the second and back until they stay.

    Args:
        first: the map where the seeds are.
        second: the other map.
        seeds: [K] pixels of the first map; may repeat.
        rounds: of there and back, at most.
    """
    basin = torch.full((len(first.features),), -1, dtype=torch.int64, device=seeds.device)
    active, guess = torch.unique(seeds), None
    found = [PixelPairs(first=active[:0], second=active[:0])]
    for _ in range(rounds):
        if len(active) == 0:
            break
        there = second.nearest(first.features[active], guess)
        back = first.nearest(second.features[there], active)
        basin[active] = back
        stays = back == active
        found.append(PixelPairs(first=active[stays], second=there[stays]))
        # Where another seed has been before, this one could only follow it. Of several that meet, one goes on.
        goes_on = basin[back] < 0
        active, place = torch.unique(back[goes_on], return_inverse=True)
        guess = torch.empty_like(active)
        guess[place] = there[goes_on]
    return Convergence(pairs=PixelPairs.join(found).unique()[0], basin=basin)


@torch.inference_mode()
def find_round_trips(
    first: SearchableMap, second: SearchableMap, starts: Tensor, *, tolerance_px: float = 0.0
) -> PixelPairs:
    """Match given pixels with their nearest neighbours, where the way back ends near the start.

    Args:
        first: the map where the start pixels are.
        second: the other map.
        starts: [K] pixels of the first map; repeated ones count once.
        tolerance_px: the way back must end less than this far from the start; 0: at the start itself.
    """
    starts = torch.unique(starts)
    there = second.nearest(first.features[starts])
    back = first.nearest(second.features[there], starts)
    width = first.size[1]
    rows, columns = starts // width - back // width, starts % width - back % width
    returns = (starts == back) | ((rows**2 + columns**2).double().sqrt() < tolerance_px)
    return PixelPairs(first=starts[returns], second=there[returns])


def match_both_ways(
    first: SearchableMap, second: SearchableMap, start: Start, *, tolerance_px: float | None = None
) -> PixelPairs:
    """Matches from some pixels of the first map, then those from some of the second; not unique.

    Args:
        first: one map.
        second: the other.
        start: where from; see `Start`.
        tolerance_px: None: reciprocal search. Else the start pixels are matched by one round trip that ends less than
            this far from its start.
    """
    found = []
    for number, (one, other) in enumerate(((first, second), (second, first))):
        device = one.features.device
        seeds = grid_seeds(one.size, start, device) if isinstance(start, int) else start[number].to(device)
        if tolerance_px is None:
            found.append(find_reciprocal(one, other, seeds).pairs)
        else:
            found.append(find_round_trips(one, other, seeds, tolerance_px=tolerance_px))
    return PixelPairs.join([found[0], found[1].swapped])


@torch.inference_mode()
def match_prediction(prediction: PairPrediction, step: int, *, tolerance_px: float | None = None) -> FusedMatches:
    """Matches of one decode of a pair; their confidence is the lower one of both pixels.

    Args:
        prediction: one order of a pair.
        step: of the grids of start pixels.
        tolerance_px: as `match_both_ways` takes it.
    """
    pairs, _ = _match(prediction, step, tolerance_px).unique()
    confidence = torch.minimum(*_confidence(prediction, pairs))
    return FusedMatches(pairs=pairs, confidence=confidence)


@torch.inference_mode()
def match_predictions(forward: PairPrediction, backward: PairPrediction, start: Start) -> FusedMatches:
    """Matches that either decode of a pair finds.

    Their confidence is the geometric mean of that of both pixels, in the first of the decodes that found the match.

    Args:
        forward: the order (1, 2).
        backward: the order (2, 1), whose views are swapped.
        start: pixels of image 1 and image 2 to start from; see `Start`.

    Returns:
        pixels of image 1 and of image 2.
    """
    found, confidence = [], []
    swapped = start if isinstance(start, int) else start[::-1]
    for prediction, begin in ((forward, start), (backward, swapped)):
        pairs = _match(prediction, begin, None)
        found.append(pairs if prediction is forward else pairs.swapped)
        one, other = _confidence(prediction, pairs)
        confidence.append((one * other).sqrt())
    pairs, occurrence = PixelPairs.join(found).unique()
    return FusedMatches(pairs=pairs, confidence=torch.cat(confidence)[occurrence])


def _match(prediction: PairPrediction, start: Start, tolerance_px: float | None) -> PixelPairs:
    first, second = (
        DescriptorMap.build(view.descriptors, euclidean=prediction.euclidean)
        for view in (prediction.first, prediction.second)
    )
    return match_both_ways(first, second, start, tolerance_px=tolerance_px)


def _confidence(prediction: PairPrediction, pairs: PixelPairs) -> tuple[Tensor, Tensor]:
    """[M] of either view, where the pixels are."""
    one, other = (
        view.descriptor_confidence.float().flatten()[index.to(view.descriptor_confidence.device)].to(index.device)
        for view, index in ((prediction.first, pairs.first), (prediction.second, pairs.second))
    )
    return one, other
