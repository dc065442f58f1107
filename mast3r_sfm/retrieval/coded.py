"""The similarity of all images of a collection by ASMK, computed in blocks of rows as it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.retrieval.asmk import ALPHA, normalise
from mast3r_sfm.retrieval.postings import Postings, overlap, weight_of_distance
from mast3r_sfm.types import Float32, Int64

# Scores in hand at once, per thread: 16 MB of sums in double precision.
_CELLS_AT_ONCE = 1 << 20
_MOST_ROWS = 256

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class CodedImages:
    """The binary codes of a collection, each image as one of the database and as a query.

    The similarity of two images is the mean of both directions, and 1 of an image with itself. It comes out the same,
    to the bit, from either end, in whatever blocks and with any number of threads.
    """

    database: Postings
    query: Postings
    threads: int = 1

    def __len__(self) -> int:
        return self.database.num_images

    @property
    def rows_at_once(self) -> int:
        """Rows of the matrix in a block."""
        return int(np.clip(_CELLS_AT_ONCE // max(len(self), 1), 1, _MOST_ROWS))

    def rows(self, images: NDArray[np.integer[Any]]) -> Float32:
        """Similarity [R, N] of some images to all."""
        stops = (self.database.start[1:], self.query.start[1:])
        parts = (
            (np.asarray(images[low : low + self.rows_at_once]), *stops, len(self))
            for low in range(0, len(images), self.rows_at_once)
        )
        result = np.empty((len(images), len(self)), np.float32)
        filled = 0
        for block in _in_order(self._block, parts, self.threads):
            result[filled : filled + len(block)] = block
            filled += len(block)
        return result

    def lower_blocks(self) -> Iterator[tuple[int, Float32]]:
        """The matrix up to its diagonal, each score computed once.

        Yields:
            The first image of a block of B, from the first on, and the similarity [B, first + B] of these images to
            themselves and to all before.
        """
        first = 0
        for block in _in_order(self._block, self._lower_parts(), self.threads):
            yield first, block
            first += len(block)

    def _lower_parts(self) -> Iterator[tuple[Int64, Int64, Int64, int]]:
        database_stop, query_stop = self.database.start[:-1].copy(), self.query.start[:-1].copy()
        for low in range(0, len(self), self.rows_at_once):
            high = min(low + self.rows_at_once, len(self))
            # Lists are sorted by image: what is added here to their ends are the images of this block.
            for stop, postings in ((database_stop, self.database), (query_stop, self.query)):
                words = postings.word[postings.first[low] : postings.first[high]]
                stop += np.bincount(words, minlength=len(stop))
            yield np.arange(low, high), database_stop.copy(), query_stop.copy(), high

    def _block(self, part: tuple[Int64, Int64, Int64, int]) -> Float32:
        images, database_stop, query_stop, columns = part
        weight = weight_of_distance(self.database.bits, ALPHA)
        as_query, as_database = self.query.entries_per_image(), self.database.entries_per_image()
        there = overlap(self.query.entries(images), self.database, weight, database_stop, columns)
        there = normalise(there, as_query[images], as_database[:columns])
        back = overlap(self.database.entries(images), self.query, weight, query_stop, columns)
        there += normalise(back, as_database[images], as_query[:columns])
        values = (there / 2).astype(np.float32)
        values[np.arange(len(images)), images] = 1
        return values


def _in_order(work: Callable[[Task], Result], tasks: Iterable[Task], threads: int) -> Iterator[Result]:
    """Results in the order of the tasks, few of which are under way or waiting at any time."""
    if threads <= 1:
        yield from map(work, tasks)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
