"""Which windows of two large photos are matched with each other (Leroy, Cabon, Revaud, MASt3R, 2024, section 3.4).

Each photo is covered with windows that overlap. The coarse matches say where the content of a window lies in the other
photo, and window pairs are chosen greedily until they cover most of the matches. `coarse_to_fine.json` of the golden
files fixes every number here; how its rules were found stands in docs/design.md.

Sizes are width and height in pixels. Windows are boxes left, top, right, bottom of whole pixels, in upright photos.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Float64, Int64

Size = tuple[int, int]

OVERLAP = 0.5
"""Of neighbouring windows, at least."""
COVERAGE = 0.9
"""Share of the matches' weight that the chosen window pairs cover."""
MIN_MATCHES = 10
"""Matches in a window below which they do not tell where its content lies. The golden files allow 4 to 35."""
SHORT_SIDE = 0.7525
"""Short side over long side of a window without a given shape: 3:4 and a little more. The golden files allow 0.75246 to
0.75252."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a photo is cut into windows."""

    photo: Size
    """Of the upright photo."""
    window: Size
    """Of the windows of its grid."""
    shape: Size | None
    """Of the windows that follow the other photo's; None: as large as what they have to show, landscape or portrait."""

    @property
    def is_whole(self) -> bool:
        """The photo does not hold one window: it is its own, only one."""
        return any(window > photo for window, photo in zip(self.window, self.photo, strict=True))


def start_pos(total_px: int, window_px: int, overlap: float = OVERLAP) -> Int64:
    """Where windows start along an axis: evenly spread from one end to the other.

    Returns:
        [n] ascending; [0] where the photo is no larger than a window.

    Raises:
        ShapeError: sides below one pixel, or an overlap outside [0, 1).
    """
    if min(total_px, window_px) < 1 or not 0 <= overlap < 1:
        raise ShapeError(
            f"windows of {window_px} px on {total_px} px, overlap {overlap}: sides >= 1, overlap in [0, 1)"
        )
    free = max(0, total_px - window_px)
    count = int(np.ceil(free / (window_px * (1 - overlap)))) + 1
    return np.round(np.linspace(0, free, count)).astype(np.int64)


def window_size(photo: Size, size_px: int, patch_px: int = 16) -> Size:
    """Windows of a photo's own shape: the long side `size_px`, the short one cut to whole patches, one at least."""
    longer, shorter = max(photo), min(photo)
    short = max(patch_px, shorter * size_px // longer // patch_px * patch_px)
    return (size_px, short) if photo[0] >= photo[1] else (short, size_px)


def grid(photo: Size, window: Size, overlap: float = OVERLAP) -> Int64:
    """The windows [n, 4] that cover a photo, row by row; the whole photo where it does not hold one window."""
    if Tiling(photo=photo, window=window, shape=None).is_whole:
        return np.array([[0, 0, *photo]], np.int64)
    left, top = (start_pos(total, side, overlap) for total, side in zip(photo, window, strict=True))
    corners = np.stack(np.broadcast_arrays(left[None, :], top[:, None]), axis=-1).reshape(-1, 2)
    return np.concatenate([corners, corners + window], axis=1)


def norm_windows(boxes: Float64, photo: Size, shape: Size | None) -> Int64:
    """Bring boxes to one shape, around the same centres, and inside the photo.

    Args:
        boxes: [n, 4], anywhere.
        photo: its size.
        shape: width and height of the windows; None: each keeps its longer side, and becomes landscape or portrait.

    Raises:
        ShapeError: the photo does not hold one window of that shape.
    """
    if shape is not None and Tiling(photo=photo, window=shape, shape=shape).is_whole:
        (width, height), (wide, high) = photo, shape
        raise ShapeError(f"a photo of {width}×{height} px holds no window of {wide}×{high} px; take it whole")
    near, far = boxes[:, :2], boxes[:, 2:]
    size: Float64 = np.broadcast_to(np.array(shape or (0, 0), np.float64), near.shape)
    if shape is None:
        given = far - near
        longer = given.max(axis=1, keepdims=True)
        is_long = np.stack([given[:, 0] >= given[:, 1], given[:, 0] < given[:, 1]], axis=1)
        size = np.where(is_long, longer, SHORT_SIDE * longer)
    # The far end is rounded down, and so is the size.
    end = np.floor((near + far) / 2 + size / 2)
    whole = np.clip(np.floor(size), 1, photo)
    start = np.clip(end - whole, 0, photo - whole)
    return np.concatenate([start, start + whole], axis=1).astype(np.int64)


def greedy(weights: Float64, coverage: float = COVERAGE) -> Int64:
    """Choose window pairs, each time the one that adds most, until they cover enough.

    A match counts with its largest weight among the chosen pairs.

    Args:
        weights: [P, M] how well a window pair shows a match, at least 0.
        coverage: share to reach of what all window pairs together cover.

    Returns:
        numbers of window pairs in the order of choice.
    """
    pair, match = np.nonzero(weights)
    return _choose(_Shown(pair=pair, match=match, weight=weights[pair, match]), weights.shape, coverage)


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """Matches [K] that window pairs [K] show, and how well."""

    pair: Int64
    match: Int64
    weight: Float64


def _choose(shown: _Shown, size: tuple[int, int], coverage: float) -> Int64:
    pairs, matches = size
    covered, best = np.zeros(matches), np.zeros(matches)
    np.maximum.at(best, shown.match, shown.weight)
    goal = coverage * best.sum()
    starts = np.searchsorted(shown.pair, np.arange(pairs + 1))
    chosen: list[int] = []
    while covered.sum() < goal:
        gain = np.bincount(shown.pair, (shown.weight - covered[shown.match]).clip(min=0), minlength=pairs)
        winner = int(gain.argmax())
        if gain[winner] <= 0:
            break
        chosen.append(winner)
        part = slice(starts[winner], starts[winner + 1])
        covered[shown.match[part]] = np.maximum(covered[shown.match[part]], shown.weight[part])
    return np.array(chosen, np.int64)


def select(
    matches: tuple[Float64, Float64],
    tilings: tuple[Tiling, Tiling],
    *,
    overlap: float = OVERLAP,
    coverage: float = COVERAGE,
) -> tuple[Int64, Int64]:
    """Choose the window pairs in which the matches of two photos are to be found again.

    Every window of either grid is paired with a window of the other photo, around the mean place of the partners of its
    matches. A pair shows the matches of its grid window, the better the more central they are in both windows.

    Args:
        matches: [M, 2] pixels of upright photos, of the first and of the second.
        tilings: of both photos.
        overlap: of neighbouring windows of a grid.
        coverage: share of the matches' weight to cover.

    Returns:
        windows of the first photo [P, 4] and those of the second, pair by pair, in the order of choice.
    """
    first = _candidates(matches, tilings, overlap)
    second = _candidates(matches[::-1], tilings[::-1], overlap)
    boxes = np.concatenate([first[0], second[1]]), np.concatenate([first[1], second[0]])
    shown_pair = np.concatenate([first[2], second[2] + len(first[0])])
    shown_match = np.concatenate([first[3], second[3]])
    weight = np.exp(-sum(_off_centre(matches[side][shown_match], boxes[side][shown_pair]) for side in (0, 1)) / 2)
    shown = _Shown(pair=shown_pair, match=shown_match, weight=weight)
    chosen = _choose(shown, (len(boxes[0]), len(matches[0])), coverage)
    return boxes[0][chosen], boxes[1][chosen]


def _candidates(
    matches: tuple[Float64, Float64], tilings: tuple[Tiling, Tiling], overlap: float
) -> tuple[Int64, Int64, Int64, Int64]:
    """Windows of one photo's grid [n, 4], their partners [n, 4], and which window [K] holds which match [K]."""
    own, other = matches
    windows = grid(tilings[0].photo, tilings[0].window, overlap)
    inside = np.asarray(((own >= windows[:, None, :2]) & (own < windows[:, None, 2:])).all(axis=2))
    enough = inside.sum(axis=1) >= MIN_MATCHES
    windows, inside = windows[enough], inside[enough]
    window, match = np.nonzero(inside)
    if len(windows) == 0:
        return windows, windows, window, match
    starts = np.searchsorted(window, np.arange(len(windows)))
    partners = other[match]
    if tilings[1].is_whole:
        return windows, np.tile(grid(tilings[1].photo, tilings[1].window), (len(windows), 1)), window, match
    mean = np.add.reduceat(partners, starts) / np.diff(starts, append=len(window))[:, None]
    half = np.zeros_like(mean)
    if tilings[1].shape is None:
        half = (np.maximum.reduceat(partners, starts) - np.minimum.reduceat(partners, starts)) / 2
    boxes = norm_windows(np.concatenate([mean - half, mean + half], axis=1), tilings[1].photo, tilings[1].shape)
    return windows, boxes, window, match


def _off_centre(xy: Float64, boxes: Int64) -> Float64:
    """[K] squared distance of pixels from the centres of their boxes, in half sides."""
    low, high = boxes[:, :2], boxes[:, 2:]
    offset = (2 * xy - low - high) / (high - low)
    squared: Float64 = (offset**2).sum(axis=1)
    return squared
