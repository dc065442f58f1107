"""Opening photo files with Pillow, whatever their format, mode and size, without touching the process for good."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin

# Only formats of photos: a file is taken for what it is, not for what its name says, and nobody wants a PostScript
# interpreter to start because a file ends in .jpg.
_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF", "AVIF", "JPEG2000")
_BIT_DEPTHS = (8, 10, 12, 14, 16)
_pillow_lock = threading.Lock()


@contextmanager
def _without_limit() -> Iterator[None]:
    # Pillow's pixel limit and Python's warning filters belong to the whole process, so only one thread at a time may
    # change them, and for as short as possible.
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open a photo file and read its header; the pixels are decoded by `load()` or by what is done with it.

    Pillow's own limit on pixels does not apply: the caller checks `image.size` against its own.

    Raises:
        OSError: the file cannot be opened or is no photo; Pillow also raises ValueError, SyntaxError and others for
            broken files.
    """
    # Given a path rather than a stream, Pillow maps uncompressed files into memory, and then scrambles a TIFF that its
    # orientation turns by 90°.
    with path.open("rb") as stream:
        with _without_limit():
            Image.init()
            image = Image.open(stream, formats=[name for name in _FORMATS if name in Image.OPEN])
        with image:
            yield image


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the pixels in the file of a photo that was opened and not yet decoded."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Pillow swaps the sides of a TIFF that its orientation turns.
        return int(image.tag_v2[ExifTags.Base.ImageWidth]), int(image.tag_v2[ExifTags.Base.ImageLength])
    return image.size


def decode(image: Image.Image, at_least: tuple[int, int]) -> tuple[float, float, float, float]:
    """Decode a photo, a JPEG at a fraction of its size where that is still `at_least` so large (width, height).

    Returns:
        Where the photo lies in the decoded pixels: left, top, right, bottom. The last pixels of a reduced JPEG may
        reach over the photo's edge.
    """
    if is_decoded_upright(image):
        with _without_limit():  # Pillow checks the size of a TIFF once more
            image.load()
        return 0.0, 0.0, float(image.width), float(image.height)
    reduced = image.draft(None, at_least) if image.format in ("JPEG", "MPO") else None
    full = (0.0, 0.0, float(image.width), float(image.height))
    image.load()
    return full if reduced is None else reduced[1]


def is_decoded_upright(image: Image.Image) -> bool:
    """Whether Pillow applies the orientation of this file while it decodes it, as it does for TIFF alone."""
    return image.format == "TIFF"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB. Alpha is dropped; deeper grey values are scaled by `to_8_bit`.

    Raises:
        ValueError: Pillow cannot convert the mode.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def to_8_bit(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Scale grey values [H, W] of any type to 0..255.

    Integers are taken as the smallest usual bit depth (8, 10, 12, 14, 16) that holds them, so 16-bit values are divided
    by 257. Floats up to 1 are taken as 0..1. Larger values than 16 bits are scaled by their maximum. Negative values
    and NaN become 0.
    """
    grey = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    peak = float(grey.max(initial=0.0))
    if values.dtype.kind == "f" and peak <= 1:
        white = 1.0
    else:
        white = next((2.0**bits - 1 for bits in _BIT_DEPTHS if peak <= 2**bits - 1), peak)
    return np.rint(grey * (255 / white)).astype(np.uint8)
