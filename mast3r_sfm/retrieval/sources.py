"""Where pairs come from besides retrieval: the order of the photos, their positions, a list of the user's.

Every source gives pairs of image numbers [P, 2]; `retrieval.stage` joins the sources and makes the graph of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from mast3r_sfm.errors import InputError
from mast3r_sfm.geometry.geodesy import earth_centred
from mast3r_sfm.progress import Progress
from mast3r_sfm.types import ImageRecord, Int64


def sequences(names: Sequence[str]) -> list[Int64]:
    """The images of each folder in the order in which they were taken, as their names tell: frame2 before frame10."""
    folders: dict[PurePosixPath, list[int]] = {}
    for index, name in enumerate(names):
        folders.setdefault(PurePosixPath(name).parent, []).append(index)
    return [np.array(sorted(images, key=lambda i: _natural(names[i])), np.int64) for images in folders.values()]


def sequential_pairs(names: Sequence[str], window: int) -> Int64:
    """Every image with the `window` next ones of its folder, and with those twice, four times, … as far on.

    The far ones, `window` at most, tie a slow camera's path together.
    """
    steps = [*range(1, window + 1), *(window * 2**doubling for doubling in range(1, window + 1))]
    found = []
    for order in sequences(names):
        for step in (step for step in steps if step < len(order)):
            found.append(np.stack([order[:-step], order[step:]], axis=1))
    return _stacked(found)


def swin_pairs(names: Sequence[str], window: int) -> Int64:
    """Every image with the `window` next ones of its folder, the last ones with the first: a path around an object."""
    found = []
    for order in sequences(names):
        for step in range(1, min(window, len(order) - 1) + 1):
            found.append(np.stack([order, np.roll(order, -step)], axis=1))
    return _stacked(found)


def gps_pairs(records: Sequence[ImageRecord], neighbours: int) -> Int64:
    """Every image that has a GPS position with the `neighbours` nearest ones.

    Raises:
        InputError: fewer than two images have a position.
    """
    known = np.array([index for index, record in enumerate(records) if record.gps is not None], np.int64)
    if len(known) < 2:
        raise InputError(
            f"{len(known)} of {len(records)} photos have a GPS position in their EXIF data, so that no pairs follow "
            "from it; choose another source, for example --pairs retrieval"
        )
    # Altitudes of phones are off by tens of metres, and some photos have none.
    places = earth_centred([(*record.gps[:2], 0.0) for record in records if record.gps is not None])
    count = min(neighbours + 1, len(known))
    near = np.asarray(cKDTree(places).query(places, k=count)[1]).reshape(len(known), count)
    pairs = np.stack([np.repeat(known, count), known[near.ravel()]], axis=1)
    return _stacked([pairs[pairs[:, 0] != pairs[:, 1]]])


def read_pairs(path: Path, names: Sequence[str], left_out: Sequence[str], progress: Progress) -> Int64:
    """Read a list of pairs as COLMAP takes it: two names in each line, with a space between them.

    Names with spaces are told apart by what photos there are. Empty lines and those that begin with # are passed over,
    and so are pairs with photos that were left out, with a warning.

    Args:
        path: the list.
        names: of the images.
        left_out: names of photos that cannot be used.
        progress: warned.

    Raises:
        InputError: the file cannot be read, a line is no pair, names a photo that does not exist, or there is no pair.
    """
    number = {name: index for index, name in enumerate(names)} | dict.fromkeys(left_out, -1)
    pairs, lost = [], 0
    for line, text in enumerate(_lines(path), start=1):
        if not text or text.startswith("#"):
            continue
        pair = _split(text, number)
        if pair is None:
            raise InputError(
                f"{path}, line {line}: {text!r} is not two names of photos with a space between them; "
                "names are paths below the folder with the photos"
            )
        if pair[0] == pair[1] and pair[0] >= 0:
            raise InputError(f"{path}, line {line}: a photo cannot be matched with itself")
        lost += min(pair) < 0
        if min(pair) >= 0:
            pairs.append(pair)
    if lost:
        progress.warn(f"{path}: {lost} pairs name photos that are left out, and are passed over")
    if not pairs:
        raise InputError(f"{path} holds no pair; it needs lines with the names of two photos")
    return np.array(pairs, np.int64)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise InputError(f"cannot read the list of pairs {path}: {reason}") from error


def _split(text: str, number: dict[str, int]) -> tuple[int, int] | None:
    """The two names of a line, of which either may have spaces."""
    for gap in re.finditer(r"\s+", text):
        first, second = text[: gap.start()], text[gap.end() :]
        if first in number and second in number:
            return number[first], number[second]
    return None


def _natural(name: str) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", name)
    # Names that differ only in leading zeros need an order, too.
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts] + [(1, name)]


def _stacked(found: Sequence[NDArray[np.int64]]) -> Int64:
    return np.concatenate(found) if found else np.zeros((0, 2), np.int64)
