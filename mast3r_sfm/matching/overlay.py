"""Matches on what was drawn over the photos, or moved with the camera: a logo, a frame, the bonnet of a car.

Such a thing stands at the same pixels of every photo, so that any two photos match on it, whatever else they show.
What tells it from a scene that hardly moved: the displacement of a scene grows from nothing by and by, so that matches
that moved a little surround the patch that did not move at all. Around an overlay, there are few. On pairs
of 19 sets of real photos, in no twenty-fourth of the picture did more than 42 % of the matches that moved by at most
FAR_PX move by at most SHARP_PX; with overlays pasted onto photos, some have 70 % and more.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from mast3r_sfm.types import Bool, Float64

SHARP_PX = 0.75
STATIC_PX = 1.5
FAR_PX = 6.0
"""Displacements, in network pixels, up to which a match counts as exactly in place, as in place, and as nearly so."""
MIN_SHARP = 8
"""Matches on an overlay below which there is none: fewer do no harm."""
SHARP_SHARE = 0.6
"""Of the matches in and around a patch that moved by at most FAR_PX, the share exactly in place from which the patch
is an overlay's."""
RADIUS = 0.1
"""How far apart matches of one patch are at most, and how wide the surroundings: this share of the long side."""
BORDER = 0.12
"""What is the border: this share of the picture's short side."""
FILLED_SHARE = 0.5
"""Of the cells inside the border that hold matches, the share that is in place from which the whole picture is: two
photos from one tripod, or the same photo twice."""
COLUMNS, ROWS = 8, 6
MIN_CELLS = 16
"""Where matches are few, the share is of as many cells: a logo in the middle and nothing else is no picture."""


def overlay_matches(xy_first: Float64, xy_second: Float64, frames: tuple[Float64, Float64]) -> Bool:
    """Which matches [M] lie on an overlay; none where what is in place fills the picture.

    Overlays are looked for at the same place relative to one of the four corners or to the middle, so that photos may
    differ in shape.

    Args:
        xy_first: [M, 2] network pixels.
        xy_second: [M, 2].
        frames: what each image shows, [2, 2]: its first and its last corner in the same pixels.
    """
    moved = min((_moved(xy_first, xy_second, shift) for shift in _anchors(*frames)), key=_moved_most)
    sharp = moved <= SHARP_PX
    overlay: Bool = np.zeros(len(moved), np.bool_)
    if sharp.sum() < MIN_SHARP or _fills_picture(moved <= STATIC_PX, xy_first, frames[0]):
        return overlay
    radius = RADIUS * float(np.ptp(frames[0], axis=0).max())
    tree = cKDTree(xy_first[sharp])
    links = tree.query_pairs(radius, output_type="ndarray")
    shape = (tree.n, tree.n)
    count, patch = connected_components(coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=shape))
    # What moved a little counts against the patch beside which it lies.
    around = np.flatnonzero((moved <= FAR_PX) & ~sharp)
    distance, nearest = (np.asarray(found) for found in tree.query(xy_first[around], distance_upper_bound=radius))
    around, beside = around[distance < np.inf], patch[nearest[distance < np.inf]]
    exact, moving = (np.bincount(patches, minlength=count) for patches in (patch, beside))
    alone = exact >= SHARP_SHARE * (exact + moving)
    overlay[sharp] = alone[patch]
    overlay[around] = alone[beside] & (moved[around] <= STATIC_PX)
    if overlay.sum() < MIN_SHARP:
        overlay[:] = False
    return overlay


def _anchors(first: Float64, second: Float64) -> list[Float64]:
    """Shifts [2] that bring a corner, or the middle, of the first frame to that of the second; each once."""
    low, high = second - first
    corners = list(product(*np.stack([low, high], axis=1).tolist()))
    return list(np.unique([*corners, ((low + high) / 2).tolist()], axis=0))


def _moved(xy_first: Float64, xy_second: Float64, shift: Float64) -> Float64:
    distance: Float64 = np.linalg.norm(xy_second - xy_first - shift, axis=1)
    return distance


def _moved_most(moved: Float64) -> int:
    """Order of the shifts: most matches exactly in place first."""
    return -int((moved <= SHARP_PX).sum())


def in_border(xy: Float64, frame: Float64) -> Bool:
    """Which pixels [M, 2] lie near the edge of what an image shows, [2, 2]."""
    inside: Bool = ((xy >= frame[0] + _margin(frame)) & (xy < frame[1] - _margin(frame))).all(axis=1)
    return ~inside


def _margin(frame: Float64) -> float:
    return BORDER * float(np.ptp(frame, axis=0).min())


def _fills_picture(static: Bool, xy: Float64, frame: Float64) -> bool:
    """Whether most of the picture inside the border, as far as it holds matches, is in place."""
    inside = ~in_border(xy, frame)
    size = np.ptp(frame, axis=0) - 2 * _margin(frame)
    column, row = ((xy[inside] - frame[0] - _margin(frame)) / size * [COLUMNS, ROWS]).astype(np.int64).T
    held = np.bincount(column * ROWS + row, minlength=COLUMNS * ROWS)
    in_place = np.bincount((column * ROWS + row)[static[inside]], minlength=COLUMNS * ROWS)
    filled = int(((held > 0) & (2 * in_place >= held)).sum())
    return filled >= FILLED_SHARE * max(int((held > 0).sum()), MIN_CELLS)
