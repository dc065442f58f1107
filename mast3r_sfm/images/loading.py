"""Reading a photo for a network: upright, RGB, resized, with the exact way back to the stored pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mast3r_sfm.errors import InputError
from mast3r_sfm.images.decoding import decode, is_decoded_upright, open_image, stored_size, to_rgb
from mast3r_sfm.types import Float64, ImageRecord, LoadedImage, PixelTransform

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns stored pixels upright, by EXIF orientation."""

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


def load_image(root: Path, record: ImageRecord, max_size_px: int) -> LoadedImage:
    """Read a photo as 8-bit RGB, upright, its long side at most `max_size_px`; it is never enlarged.

    Returns:
        Pixels [H, W, 3] and their transform to the stored pixels of the photo.

    Raises:
        InputError: the file cannot be read, or is not the one that `record` describes.
    """
    path = root / record.name
    stored = (record.width_px, record.height_px)
    size = network_size(*stored, max_size_px)
    # Pillow raises many types for broken files; all of them mean the same to the user.
    try:
        with open_image(path) as image:
            upright = _read(image, record, size)
    except Exception as error:
        raise InputError(f"cannot read the photo {path}: {error}; replace or remove it") from error
    if upright is None:
        raise InputError(f"the photo {path} is not the one that was listed; it changed during the run, start it again")
    return LoadedImage(
        record=record,
        pixels=np.array(upright),  # a copy, as torch wants arrays it may write to
        transform=PixelTransform(matrix=photo_from_network(stored, size, record.orientation)),
    )


def network_size(width_px: int, height_px: int, max_size_px: int) -> tuple[int, int]:
    """Width and height of stored pixels after shrinking the long side to `max_size_px`; each at least 1."""
    shrink = min(1.0, max_size_px / max(width_px, height_px))
    return max(1, round(width_px * shrink)), max(1, round(height_px * shrink))


def photo_from_network(stored: tuple[int, int], resized: tuple[int, int], exif_orientation: int) -> Float64:
    """Affine map [2, 3] from upright, resized pixels to stored pixels.

    Args:
        stored: width and height of the photo in the file.
        resized: width and height after the resize, before the photo was turned upright.
        exif_orientation: 1–8.
    """
    rows = np.array(_STORED_FROM_UPRIGHT[exif_orientation], dtype=np.float64)
    scale = np.array(stored, dtype=np.float64) / np.array(resized)
    return np.column_stack([rows[:, :2] * scale[:, None], rows[:, 2] * stored])


def _read(image: Image.Image, record: ImageRecord, size: tuple[int, int]) -> Image.Image | None:
    if stored_size(image) != (record.width_px, record.height_px):
        return None
    box = decode(image, at_least=size)
    turned = 1 if is_decoded_upright(image) else record.orientation
    if turned != record.orientation and record.orientation >= 5:
        size = size[::-1]
    # A float or 16-bit photo is brought to 8 bits first: Pillow resizes RGB best, and all modes come out alike.
    resized = to_rgb(image).resize(size, Image.Resampling.LANCZOS, box=box)
    return resized if turned == 1 else resized.transpose(_UPRIGHT[turned])
