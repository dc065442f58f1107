"""Reading a photo for a network: upright, RGB, resized and cropped, with the exact way back to the stored pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mast3r_sfm.errors import InputError, ShapeError
from mast3r_sfm.images.decoding import decode, is_decoded_upright, open_image, stored_size, to_rgb
from mast3r_sfm.images.framing import (
    Box,
    Framing,
    frame_photo,
    photo_from_network,
    photo_from_window,
    turned_by,
)
from mast3r_sfm.types import Float32, ImageRecord, LoadedImage, Preparation

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
_INVERSE = {6: 8, 8: 6}
"""The orientation that undoes another, where it is not its own inverse."""


def load_image(root: Path, record: ImageRecord, preparation: Preparation) -> LoadedImage:
    """Read a photo as 8-bit RGB, upright, resized and cropped as a model wants it.

    Returns:
        Pixels [H, W, 3] and their transform to the stored pixels of the photo.

    Raises:
        InputError: the file cannot be read, or is not the one that `record` describes.
    """
    stored = (record.width_px, record.height_px)
    framing = frame_photo(turned_by(record.orientation, stored), preparation)
    read = _read_shrunk if preparation.patch_px == 0 else _read_whole
    with _opened(root, record) as image:
        upright = read(image, record, framing)
    return LoadedImage(
        record=record,
        pixels=np.array(upright),  # a copy, as torch wants arrays it may write to
        transform=photo_from_network(stored, framing, record.orientation),
    )


@dataclass(frozen=True, kw_only=True)
class DecodedPhoto:
    """All pixels of a photo in memory, four bytes each, to cut windows from; see `decode_photo`."""

    record: ImageRecord
    image: Image.Image
    """RGB."""
    orientation: int
    """EXIF's, as far as it is still to be applied."""

    def window(self, box: Box, size: tuple[int, int]) -> LoadedImage:
        """Cut out a box of the upright photo, and resize it.

        Args:
            box: left, top, right, bottom in upright pixels; inside the photo.
            size: width and height of what the network sees. That of the box: nothing is resampled.

        Raises:
            ShapeError: the box reaches out of the photo or is empty.
        """
        record, (left, top, right, bottom) = self.record, box
        width, height = turned_by(record.orientation, (record.width_px, record.height_px))
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ShapeError(f"{record.name}: window {box} does not lie in the upright photo of {width}×{height} px")
        to_decoded = photo_from_window(self.image.size, self.orientation, (0, 0, width, height), (width, height))
        corners = np.rint(to_decoded.to_photo(np.array([[left, top], [right, bottom]], np.float64))).astype(int)
        # Only the window is turned: a turned copy of the photo would take as much memory again.
        cut = _turn(self.image.crop((*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist())), self.orientation)
        if cut.size != size:
            shrinks = max(cut.size) > max(size)
            cut = cut.resize(size, Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC)
        return LoadedImage(
            record=record,
            pixels=np.array(cut),
            transform=photo_from_window((record.width_px, record.height_px), record.orientation, box, size),
        )


def decode_photo(root: Path, record: ImageRecord) -> DecodedPhoto:
    """Read all pixels of a photo as 8-bit RGB, to cut any number of windows from.

    Raises:
        InputError: the file cannot be read, or is not the one that `record` describes.
    """
    with _opened(root, record) as image:
        decode(image, at_least=(record.width_px, record.height_px))
        # Closing the file leaves the pixels of an image that was decoded.
        return DecodedPhoto(record=record, image=to_rgb(image), orientation=_still_to_apply(image, record))


def load_grey(root: Path, record: ImageRecord) -> Float32:
    """Read all pixels of a photo as grey values [H, W] in 0..255, as they are stored: its orientation is not applied.

    Raises:
        InputError: the file cannot be read, or is not the one that `record` describes.
    """
    with _opened(root, record) as image:
        decode(image, at_least=(record.width_px, record.height_px))
        grey = to_rgb(image).convert("L")
        if is_decoded_upright(image):
            grey = _turn(grey, _INVERSE.get(record.orientation, record.orientation))
    return np.asarray(grey, np.float32)


@contextmanager
def _opened(root: Path, record: ImageRecord) -> Iterator[Image.Image]:
    path = root / record.name
    # Pillow raises many types for broken files; all of them mean the same to the user.
    try:
        with open_image(path) as image:
            if stored_size(image) != (record.width_px, record.height_px):
                raise InputError(
                    f"the photo {path} is not the one that was listed; it changed during the run, start it again"
                )
            yield image
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot read the photo {path}: {error}; replace or remove it") from error


def _read_shrunk(image: Image.Image, record: ImageRecord, framing: Framing) -> Image.Image:
    """The fast way: a JPEG is decoded at a fraction of its size, and what is left to turn is small."""
    box = decode(image, at_least=turned_by(record.orientation, framing.resized))
    orientation = _still_to_apply(image, record)
    # A float or 16-bit photo is brought to 8 bits first: Pillow resizes RGB best, and all modes come out alike.
    rgb = to_rgb(image)
    return _turn(rgb.resize(turned_by(orientation, framing.resized), framing.resample, box=box), orientation)


def _read_whole(image: Image.Image, record: ImageRecord, framing: Framing) -> Image.Image:
    """MASt3R's way, to the byte: all pixels, turned upright, converted, resized and cropped in this order."""
    decode(image, at_least=(record.width_px, record.height_px))
    upright = _turn(to_rgb(image), _still_to_apply(image, record))
    return upright.resize(framing.resized, framing.resample).crop(framing.box)


def _still_to_apply(image: Image.Image, record: ImageRecord) -> int:
    return 1 if is_decoded_upright(image) else record.orientation


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(_UPRIGHT[orientation])
