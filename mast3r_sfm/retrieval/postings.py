"""An inverted file of binary codes: who sees a word, and how much that agrees with what others see in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Float64, Int32, Int64

Codes = NDArray[np.unsignedinteger[Any]]

# Code pairs compared at once: the working set stays within the processor's cache.
_PAIRS_AT_ONCE = 1 << 15
# Below this length, reading lists element by element is faster than list by list.
_SHORT = 16
# Sums of weights on this grid are exact in float64 up to four million words, and so the same in any order: neither
# blocks nor threads change a bit of a score. It is a thousandth of what a score is rounded to in float32.
_GRID = 2.0**-30
# How much room is made when there is none left.
_GROWTH = 1.125


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The words and codes of some images."""

    num_images: int
    image: Int64
    """[E] from 0 to num_images − 1, in the order in which the images were asked for."""
    word: Int32
    """[E]."""
    code: tuple[Codes, ...]
    """W planes [E] as in `Postings`."""


@dataclass(frozen=True, kw_only=True)
class Postings:
    """One code per image and word that it sees, sorted by word, then image."""

    start: Int64
    """[K + 1] where the list of each word begins and the last one ends."""
    image: Int32
    """[E]."""
    code: tuple[Codes, ...]
    """W planes [E] of 32 or 64 bits of each code: the planes of a list lie side by side."""
    first: Int64
    """[N + 1] where the entries of each image begin in the two arrays below."""
    word: Int32
    """[E] sorted by image, then word."""
    place: Int32
    """[E] where the code of this entry stands in the lists."""

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.first) - 1

    @property
    def bits(self) -> int:
        """Length of the codes, padding included."""
        return _bits(self.code)

    def entries_per_image(self) -> Int64:
        """[N]."""
        return np.diff(self.first)

    def entries(self, images: NDArray[np.integer[Any]]) -> Entries:
        """What some images see."""
        count = self.first[images + 1] - self.first[images]
        row = np.repeat(np.arange(len(images)), count)
        entry = np.arange(len(row)) + (self.first[images] - np.cumsum(count) + count)[row]
        place = self.place[entry]
        code = tuple(plane[place] for plane in self.code)
        return Entries(num_images=len(images), image=row, word=self.word[entry], code=code)


class PostingsBuilder:
    """Takes in the entries of image after image and sorts them by word, in little more than their own memory."""

    def __init__(self, num_words: int) -> None:
        """For words from 0 to `num_words` − 1."""
        self._num_words = num_words
        self._filled = 0
        self._word = np.empty(0, np.int32)
        self._planes: tuple[Codes, ...] | None = None
        self._counts = [np.zeros(1, np.int64)]

    def add(self, num_images: int, image: Int32, word: Int32, code: NDArray[np.uint32]) -> None:
        """The next images: [E] image from 0 to num_images − 1 and [E] word, sorted by both, [E, 32-bit words] codes.

        Raises:
            ShapeError: the length of the codes changes.
        """
        planes = planes_of(code)
        if self._planes is None:
            self._planes = tuple(np.empty(0, plane.dtype) for plane in planes)
        before, now = _bits(self._planes), _bits(planes)
        if before != now:
            raise ShapeError(f"codes of {now} bits after codes of {before}")
        first, self._filled = self._filled, self._filled + len(word)
        if self._filled > len(self._word):
            self._resize(int(_GROWTH * self._filled))
        self._word[first : self._filled] = word
        for plane, part in zip(self._planes, planes, strict=True):
            plane[first : self._filled] = part
        self._counts.append(np.bincount(image, minlength=num_images))

    def build(self) -> Postings:
        """The inverted file; the builder is of no use after it."""
        self._resize(self._filled)
        first = np.concatenate(self._counts).cumsum()
        order = np.argsort(self._word, kind="stable")
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        code = self._planes or ()
        for plane in code:
            plane[:] = plane[order]
        image = np.repeat(np.arange(len(first) - 1, dtype=np.int32), np.diff(first))[order]
        start = np.concatenate([[0], np.bincount(self._word, minlength=self._num_words).cumsum()])
        return Postings(start=start, image=image, code=code, first=first, word=self._word, place=place)

    def _resize(self, size: int) -> None:
        # In place: the codes of a large collection are gigabytes, which are not to be there twice.
        for array in (self._word, *(self._planes or ())):
            array.resize(size, refcheck=False)


def weight_of_distance(bits: int, alpha: float) -> Float64:
    """[bits + 1] what a pair of codes counts by the number of bits in which they differ, rounded to a fine grid."""
    similarity = np.maximum(1 - 2 * np.arange(bits + 1) / max(bits, 1), 0)
    weight: Float64 = np.rint(np.where(similarity > 0, similarity**alpha, 0.0) / _GRID) * _GRID
    return weight


def overlap(entries: Entries, postings: Postings, weight: Float64, stop: Int64, columns: int) -> Float64:
    """Sum of the weights of all pairs of codes, one of some images and one of a list, that share a word.

    Lists of equal length are compared at once, in runs that stay in the cache.

    Args:
        entries: of R images.
        postings: N images.
        weight: of each Hamming distance.
        stop: [K] where the part of each list ends that is looked at.
        columns: no image beyond this number stands before `stop` in any list.

    Returns:
        [R, columns]; exact, so the same in whatever parts it is computed.
    """
    result = np.zeros((entries.num_images, columns))
    cells = result.reshape(-1)
    begin = postings.start[entries.word]
    length = stop[entries.word] - begin
    offset = entries.image * columns
    for size, chosen in _runs(length):
        lists = _Lists(begin[chosen], size)
        differ = _distances(postings.code, lists, [plane[chosen] for plane in entries.code])
        cell = lists.read(postings.image) + lists.beside(offset[chosen])
        np.add.at(cells, cell.ravel(), weight[differ.ravel()])
    return result


class _Lists:
    """n lists of one length: arrays [n, length] or, where that is short, [length, n], so that inner loops are long."""

    def __init__(self, at: Int64, size: int) -> None:
        """Lists that begin at `at` [n]."""
        self._size = size
        self._windows = size >= _SHORT
        self._at = at if self._windows else at + np.arange(size)[:, None]
        self.shape = (len(at), size) if self._windows else (size, len(at))

    def read(self, values: NDArray[Any]) -> NDArray[Any]:
        """What stands in the lists, of values [E] for all postings."""
        if not self._windows:
            return values[self._at]
        # A view whose row i holds values[i : i + size]; what numpy has for it takes ten times as long to make.
        (stride,) = values.strides
        shape = (len(values) - self._size + 1, self._size)
        return np.ndarray(shape, values.dtype, values.data, strides=(stride, stride))[self._at]

    def beside(self, values: NDArray[Any]) -> NDArray[Any]:
        """One value [n] for each list, to be joined with what `read` gives."""
        return values[:, None] if self._windows else values


def _distances(planes: Sequence[Codes], lists: _Lists, codes: Sequence[Codes]) -> NDArray[np.unsignedinteger[Any]]:
    """Hamming distances of codes (W planes [n]) to those in n lists of W planes [E]."""
    # A byte counts to 255.
    total: NDArray[np.unsignedinteger[Any]] = np.zeros(lists.shape, np.uint8 if len(planes) == 1 else np.uint16)
    for plane, code in zip(planes, codes, strict=True):
        listed = lists.read(plane)
        np.bitwise_xor(listed, lists.beside(code), out=listed)
        total += np.bitwise_count(listed)
    return total


def _runs(length: Int64) -> Iterator[tuple[int, Int64]]:
    """The positive lengths that occur, each with at most `_PAIRS_AT_ONCE` / length of the entries that have it."""
    order = np.argsort(length, kind="stable")
    begin = 0
    for size, many in zip(*(part.tolist() for part in np.unique(length, return_counts=True)), strict=True):
        chosen = order[begin : begin + many]
        begin += many
        step = max(_PAIRS_AT_ONCE // max(size, 1), 1)
        for low in range(0, many if size else 0, step):
            yield size, chosen[low : low + step]


def _bits(planes: Sequence[Codes]) -> int:
    return sum(8 * plane.itemsize for plane in planes)


def planes_of(code: NDArray[np.uint32]) -> tuple[Codes, ...]:
    """Views [E] of the 64 bits, or where the width does not allow it 32, that stand first, second … in codes [E, W]."""
    code = np.ascontiguousarray(code)
    packed = code.view(np.uint64) if code.shape[1] and code.shape[1] % 2 == 0 else code
    return tuple(packed.T)
