"""What a network sees of a photo: how the photo is resized, what is cropped off, and the way back to stored pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mast3r_sfm.types import Float64, PixelTransform, Preparation

Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""

_STORED_FROM_UPRIGHT = {
    1: ((1, 0, 0), (0, 1, 0)),
    2: ((-1, 0, 1), (0, 1, 0)),
    3: ((-1, 0, 1), (0, -1, 1)),
    4: ((1, 0, 0), (0, -1, 1)),
    5: ((0, 1, 0), (1, 0, 0)),
    6: ((0, 1, 0), (-1, 0, 1)),
    7: ((0, -1, 1), (-1, 0, 1)),
    8: ((0, -1, 1), (1, 0, 0)),
}
"""Rows of x and y; the last column counts in widths and heights of the stored image."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """An upright photo is resized as a whole, then cropped. All sizes are width and height in pixels."""

    resized: tuple[int, int]
    resample: Image.Resampling
    offset: tuple[int, int]
    """Left and top border that the crop takes away."""
    size: tuple[int, int]
    """What is left, and what the network sees."""

    @property
    def box(self) -> Box:
        """The crop in the resized photo: left, top, right, bottom."""
        return (*self.offset, self.offset[0] + self.size[0], self.offset[1] + self.size[1])


def turned_by(orientation: int, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height after an EXIF orientation has been applied or taken back; both are the same."""
    return size if orientation < 5 else size[::-1]


def stored_from_upright(orientation: int) -> Float64:
    """[2, 2] directions (right, down) of an upright photo to those of its stored pixels, by EXIF orientation."""
    return np.array(_STORED_FROM_UPRIGHT[orientation], np.float64)[:, :2]


def frame_photo(upright: tuple[int, int], preparation: Preparation) -> Framing:
    """How a photo of that width and height, upright, becomes what a model wants.

    Without patches, its long side is shrunk to `size_px`. With patches, it follows MASt3R's preparation: the long
    side (with `square_crop` the short one) is brought to `size_px`, and the centre is cropped to multiples of the
    patch, of square images to 4:3. Where MASt3R's sides would be 0 or no multiple of the patch, ours are usable: see
    "Sizes that a network can take" in docs/design.md.
    """
    if preparation.patch_px == 0:
        resized = _shrunk(upright, preparation.size_px)
        return Framing(resized=resized, resample=Image.Resampling.LANCZOS, offset=(0, 0), size=resized)
    long, resized = _fitted(upright, preparation)
    size = _cropped(resized, preparation)
    return Framing(
        resized=resized,
        # Equal sizes count as enlarging; then nothing is resampled, and the filter does not matter.
        resample=Image.Resampling.LANCZOS if max(upright) > long else Image.Resampling.BICUBIC,
        offset=((resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2),
        size=size,
    )


def photo_from_network(stored: tuple[int, int], framing: Framing, orientation: int) -> PixelTransform:
    """The map from what the network sees to the stored pixels of a photo.

    Args:
        stored: width and height of the photo in the file.
        framing: of the upright photo.
        orientation: EXIF's, 1–8.
    """
    rows = np.array(_STORED_FROM_UPRIGHT[orientation], dtype=np.float64)
    scale = np.array(stored, dtype=np.float64) / turned_by(orientation, framing.resized)
    linear: Float64 = rows[:, :2] * scale[:, None]
    return PixelTransform(matrix=np.column_stack([linear, rows[:, 2] * stored + linear @ framing.offset]))


def photo_from_window(stored: tuple[int, int], orientation: int, box: Box, size: tuple[int, int]) -> PixelTransform:
    """The map from a window of an upright photo to the photo's stored pixels.

    Args:
        stored: width and height of the photo in the file.
        orientation: EXIF's, 1–8.
        box: left, top, right, bottom of the window in upright pixels.
        size: width and height to which the window was resized.
    """
    rows = np.array(_STORED_FROM_UPRIGHT[orientation], dtype=np.float64)
    corner, scale = np.array(box[:2], np.float64), np.array([box[2] - box[0], box[3] - box[1]]) / size
    return PixelTransform(
        matrix=np.column_stack([rows[:, :2] * scale, rows[:, 2] * stored + rows[:, :2] @ corner]),
    )


def _shrunk(upright: tuple[int, int], size_px: int) -> tuple[int, int]:
    width, height = upright
    shrink = min(1.0, size_px / max(width, height))
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def _fitted(upright: tuple[int, int], preparation: Preparation) -> tuple[int, tuple[int, int]]:
    """The long side that is asked for, and width and height after the resize."""
    longer, shorter = max(upright), min(upright)
    long = preparation.size_px
    if preparation.square_crop:
        long = round(long * (longer / shorter))
    elif round(shorter * long / longer) < preparation.patch_px:
        # Too elongated: the short side gets one patch, and the crop takes the long side's ends.
        long = round(longer * preparation.patch_px / shorter)
    # Halves go to the even number, as in the table of the golden files.
    width, height = (round(side * long / longer) for side in upright)
    return long, (width, height)


def _cropped(resized: tuple[int, int], preparation: Preparation) -> tuple[int, int]:
    patch = preparation.patch_px
    columns, rows = (min(side, preparation.size_px) // patch for side in resized)
    if resized[0] == resized[1] and not (preparation.square_ok or preparation.square_crop):
        # Three quarters, to the nearest whole patch; the smaller of two equally near, or two patches would stay two.
        rows = max(1, (3 * rows + 1) // 4)
    return columns * patch, rows * patch
