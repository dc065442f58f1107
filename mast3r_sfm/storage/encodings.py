"""The images' encodings on disk, read back a chunk at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from mast3r_sfm.errors import ArtifactError
from mast3r_sfm.storage.cache import Arrays, StageCache
from mast3r_sfm.types import Encoding, PixelTransform

IMAGES_PER_CHUNK = 64
CHUNKS_IN_MEMORY = 8


class StoredEncodings(Sequence[Encoding]):
    """Encodings in image order; image i stands in chunk i // 64. Not for use from several threads at once."""

    def __init__(self, cache: StageCache, count: int) -> None:
        """Open the encodings of `count` images. Nothing is read yet."""
        self._cache = cache
        self._count = count
        self._chunks: OrderedDict[int, list[Encoding]] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Encoding: ...

    @overload
    def __getitem__(self, index: slice) -> list[Encoding]: ...

    def __getitem__(self, index: int | slice) -> Encoding | list[Encoding]:
        """The encoding of an image. Raises ArtifactError where its chunk is gone."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"image {index} of {self._count}")
        chunk, row = divmod(index % self._count, IMAGES_PER_CHUNK)
        if chunk not in self._chunks:
            stored = self._cache.read(chunk)
            if stored is None:
                raise ArtifactError(f"{self._cache.folder}: chunk {chunk} is gone; run the command again")
            self._chunks[chunk] = unpack(*stored)
            if len(self._chunks) > CHUNKS_IN_MEMORY:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(chunk)
        return self._chunks[chunk][row]


class NumberedEncodings(Mapping[int, Encoding]):
    """Encodings of some of the images, by the images' numbers."""

    def __init__(self, images: Sequence[int], encodings: Sequence[Encoding]) -> None:
        """Encoding k is that of the image `images[k]`."""
        self._row = {image: row for row, image in enumerate(images)}
        self._encodings = encodings

    def __getitem__(self, image: int) -> Encoding:
        """The encoding of an image. Raises KeyError where it has none."""
        return self._encodings[self._row[image]]

    def __iter__(self) -> Iterator[int]:
        """The numbers of the images."""
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def pack(encodings: Sequence[Encoding]) -> tuple[Arrays, Any]:
    """Arrays and JSON value of a chunk of encodings."""
    arrays: Arrays = {
        "length": np.array([len(encoding.tokens) for encoding in encodings], np.int64),
        "tokens": np.concatenate([encoding.tokens for encoding in encodings]),
        "xy": np.concatenate([encoding.xy for encoding in encodings]),
        "attention": np.concatenate([encoding.attention for encoding in encodings]),
        "transform": np.stack([encoding.transform.matrix for encoding in encodings]),
        "network_size": np.array([encoding.network_size for encoding in encodings], np.int64),
    }
    return arrays, None


def unpack(arrays: Arrays, meta: Any) -> list[Encoding]:
    """What `pack` packed."""
    del meta
    ends = np.cumsum(arrays["length"])
    return [
        Encoding(
            tokens=arrays["tokens"][start:end],
            xy=arrays["xy"][start:end],
            attention=arrays["attention"][start:end],
            transform=PixelTransform(matrix=arrays["transform"][row]),
            network_size=(int(arrays["network_size"][row, 0]), int(arrays["network_size"][row, 1])),
        )
        for row, (start, end) in enumerate(zip(ends - arrays["length"], ends, strict=True))
    ]
