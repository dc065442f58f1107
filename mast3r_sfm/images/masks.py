"""Masks: which pixels of the photos may be used."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mast3r_sfm.config import PrepareConfig
from mast3r_sfm.errors import ConfigError, InputError
from mast3r_sfm.images.decoding import open_image, stored_size
from mast3r_sfm.progress import Progress
from mast3r_sfm.types import Bool, Encoding, Float64, ImageRecord, ImageSet, LeftOut, PixelMask, Usable

_THREADS = 4
_KEPT_BYTES = 256 << 20
"""Of masks in memory, a bit per pixel: those of 170 photos of 12 megapixels."""


@dataclass(frozen=True, kw_only=True)
class MaskFolder:
    """The folder that masks are looked for in."""

    path: Path

    @classmethod
    def open(cls, text: str, photos: Path) -> MaskFolder:
        """The folder named `text`, for photos below the folder `photos`.

        Raises:
            InputError: there is no such folder.
            ConfigError: it is the photos' own folder.
        """
        path = Path(text)
        if not path.is_dir():
            raise InputError(f"--mask-path {path} " + ("is not a folder" if path.exists() else "does not exist"))
        if path.samefile(photos):
            raise ConfigError(
                f"--mask-path {path} is the photos' own folder, where masks would be taken for photos; put them into "
                "a folder of their own, such as masks/ inside it"
            )
        return cls(path=path)

    def attach(self, records: Sequence[ImageRecord], progress: Progress) -> tuple[list[ImageRecord], list[LeftOut]]:
        """Find, read and check the mask of every photo that has one.

        Args:
            records: at least one photo.
            progress: is told how many photos have a mask.

        Returns:
            the photos with their masks; those that are left out, since their masks hide all of them.

        Raises:
            InputError: no photo has a mask, or a mask cannot be read or is not as large as its photo.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self._attach_one, records))
        count = sum(record is None or record.mask is not None for record in found)
        if not count:
            name = records[0].name
            raise InputError(
                f"no photo has a mask in {self.path}: looked for {name}.png, {_without_suffix(name)} and the like; "
                "name each mask as its photo, with .png behind"
            )
        progress.note(f"masks: {count:,} of {len(records):,} photos have one")
        hidden = [
            LeftOut(name=record.name, reason="its mask hides all of it")
            for record, masked in zip(records, found, strict=True)
            if masked is None
        ]
        return [record for record in found if record is not None], hidden

    def _attach_one(self, record: ImageRecord) -> ImageRecord | None:
        """The photo with its mask, or as it was where there is none; None where nothing of it is left."""
        name = next(
            (n for n in (f"{record.name}.png", _without_suffix(record.name)) if (self.path / n).is_file()), None
        )
        if name is None:
            return record
        masked = replace(record, mask=name, mask_sha256=_sha256(self.path / name))
        return masked if read_mask(self.path, masked).bits.any() else None


class Masks:
    """The masks of a collection, read when they are asked for; may be shared by threads."""

    def __init__(self, folder: Path, records: Sequence[ImageRecord]) -> None:
        """Nothing is read yet.

        Args:
            folder: that the masks' names are relative to.
            records: of the photos, by image number.
        """
        self._folder = folder
        self._records = records
        self._kept: OrderedDict[int, PixelMask] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def of(cls, photos: ImageSet, config: PrepareConfig) -> Masks | None:
        """The masks of some photos; None where none of them has one."""
        if not any(record.mask for record in photos.records):
            return None
        return cls(Path(config.mask_path), photos.records)

    def read(self, record: ImageRecord) -> PixelMask | None:
        """The mask of a photo; None: it has none."""
        return read_mask(self._folder, record) if record.mask else None

    def usable(self, image: int, xy: Float64) -> Bool:
        """Whether photo pixels [M, 2] of an image may be used [M]."""
        if not self._records[image].mask:
            return np.ones(len(xy), np.bool_)
        return self._mask(image).allows(xy)

    def _mask(self, image: int) -> PixelMask:
        with self._lock:
            if image not in self._kept:
                self._kept[image] = read_mask(self._folder, self._records[image])
                while len(self._kept) > 1 and sum(mask.bits.nbytes for mask in self._kept.values()) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(image)
            return self._kept[image]


class VisibleTokens(Sequence[Encoding]):
    """Encodings without the tokens whose places a mask hides: what retrieval may compare photos by."""

    def __init__(self, encodings: Sequence[Encoding], usable: Usable) -> None:
        """Nothing is read yet."""
        self._encodings = encodings
        self._usable = usable

    def __len__(self) -> int:
        return len(self._encodings)

    def __iter__(self) -> Iterator[Encoding]:
        return (self[image] for image in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Encoding: ...

    @overload
    def __getitem__(self, index: slice) -> list[Encoding]: ...

    def __getitem__(self, index: int | slice) -> Encoding | list[Encoding]:
        """The encoding of an image; the network's grid is gone from it."""
        if isinstance(index, slice):
            return [self[image] for image in range(*index.indices(len(self)))]
        encoding = self._encodings[index]
        seen = self._usable(range(len(self))[index], encoding.xy.astype(np.float64))
        return replace(encoding, tokens=encoding.tokens[seen], xy=encoding.xy[seen], attention=encoding.attention[seen])


def read_mask(folder: Path, record: ImageRecord) -> PixelMask:
    """The mask of a photo that has one, in the photo's stored pixels.

    A pixel may be used where any of the mask's colours is above 0. The mask's own EXIF orientation is not looked at.

    Raises:
        InputError: it cannot be read, or is not as large as the photo.
    """
    path = folder / (record.mask or "")
    # Pillow raises many types for broken files; all of them mean the same to the user.
    try:
        with open_image(path) as image:
            size = stored_size(image)
            usable = _usable(image) if size == (record.width_px, record.height_px) else None
    except Exception as error:
        raise InputError(f"cannot read the mask {path}: {error}; replace or remove it") from error
    if usable is None:
        raise InputError(_wrong_size(path, size, record))
    return PixelMask.of(usable)


def _usable(image: Image.Image) -> Bool:
    """[H, W], alpha left aside."""
    if image.mode in ("P", "PA", "RGBA", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    values: NDArray[np.generic] = np.asarray(image.getchannel(0) if image.mode == "LA" else image)
    above: Bool = values != 0
    return np.asarray(above.any(axis=2) if above.ndim == 3 else above, np.bool_)


def _wrong_size(path: Path, size: tuple[int, int], record: ImageRecord) -> str:
    stored = record.width_px, record.height_px
    message = (
        f"the mask {path} has {size[0]}×{size[1]} pixels, and its photo {record.name} has {stored[0]}×{stored[1]}; "
        "they must be equal"
    )
    if record.orientation >= 5 and size == stored[::-1]:
        message += ": the mask must be turned as the photo is stored, not as EXIF lets it be shown"
    return message


def _without_suffix(name: str) -> str:
    return PurePosixPath(name).with_suffix(".png").as_posix()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read the mask {path}: {os.strerror(error.errno or 0)}") from error
