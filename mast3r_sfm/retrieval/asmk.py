"""Binary ASMK: aggregated selective match kernels over visual words.

Source: Tolias, Avrithis and Jégou, "To aggregate or not to aggregate: selective match kernels for image search",
ICCV 2013. Per image and word, the residuals of the tokens to the word are summed and binarised by sign. Two images are
as similar as the codes they have in words both see: a pair of codes with share h of differing bits counts
max(0, 1 − 2h)^α. No inverse document frequency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Float32, Int32

ALPHA = 3.0
DATABASE_WORDS = 1
"""Words per token of a database image."""
QUERY_WORDS = 5
"""Words per token of a query image."""

# Code pairs compared at once: the working set stays within the processor's cache.
_PAIRS_AT_ONCE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class BinaryFeatures:
    """One aggregated binary code per word that an image sees, for a run of images, sorted by image, then word."""

    num_images: int
    image: Int32
    """[E]."""
    word: Int32
    """[E]."""
    code: NDArray[np.uint32]
    """[E, W] 32 bits a word of W; the first dimension is the highest bit of the first, padding bits are zero."""

    def __post_init__(self) -> None:
        if not len(self.image) == len(self.word) == len(self.code):
            raise ShapeError(f"features of {len(self.image)} images, {len(self.word)} words, {len(self.code)} codes")

    @classmethod
    def concatenate(cls, parts: Sequence[BinaryFeatures]) -> BinaryFeatures:
        """Join the features of consecutive runs of images into one, images numbered on."""
        first = np.cumsum([0, *(part.num_images for part in parts)])
        return cls(
            num_images=int(first[-1]),
            image=np.concatenate([part.image + int(start) for part, start in zip(parts, first[:-1], strict=True)]),
            word=np.concatenate([part.word for part in parts]),
            code=np.concatenate([part.code for part in parts]),
        )


def aggregate(tokens: Float32, image: Int32, words: Int32, centroids: Float32) -> tuple[Int32, Int32, Float32]:
    """Sum the residuals (token − word) of each image in each of its words.

    Args:
        tokens: [T, D].
        image: [T] image of each token.
        words: [T, m] words each token is assigned to.
        centroids: [K, D].

    Returns:
        [E] image, [E] word, both sorted by image, then word, and [E, D] the sums.
    """
    count, assigned = words.shape
    key = (image.astype(np.int64)[:, None] * len(centroids) + words).ravel()
    order = np.argsort(key, kind="stable")
    key = key[order]
    start = np.flatnonzero(np.diff(key, prepend=-1))
    unique, bounds = key[start], np.append(start, len(key))
    ones = np.ones(len(key), np.float32)
    member = scipy.sparse.csr_array((ones, order // assigned, bounds), shape=(len(unique), count))
    entry_word = unique % len(centroids)
    sums = member @ tokens - np.diff(bounds).astype(np.float32)[:, None] * centroids[entry_word]
    return (unique // len(centroids)).astype(np.int32), entry_word.astype(np.int32), sums.astype(np.float32)


def binarise(values: Float32) -> NDArray[np.uint32]:
    """Signs of [E, D] values as [E, ceil(D / 32)] packed bits, 1 where positive."""
    bits = np.packbits(values > 0, axis=1)
    padded = np.zeros((len(bits), -(-bits.shape[1] // 4) * 4), np.uint8)
    padded[:, : bits.shape[1]] = bits
    return padded.view(">u4").astype(np.uint32)


def describe(tokens: Float32, image: Int32, words: Int32, centroids: Float32, num_images: int) -> BinaryFeatures:
    """Binary features of `num_images` images from their tokens; arguments as for `aggregate`."""
    entry_image, entry_word, sums = aggregate(tokens, image, words, centroids)
    return BinaryFeatures(num_images=num_images, image=entry_image, word=entry_word, code=binarise(sums))


def score(query: BinaryFeatures, database: BinaryFeatures, *, alpha: float = ALPHA) -> Float32:
    """Similarity of every query image to every database image through an inverted file.

    Work grows with the pairs of codes that share a word; memory, beside the result, is bounded.

    Returns:
        [query images, database images] in [0, 1]; not symmetric where both sides were assigned differently.
    """
    width = max(query.code.shape[1], database.code.shape[1])
    order = np.argsort(database.word, kind="stable")
    postings_word, postings_image = database.word[order], database.image[order].astype(np.int64)
    query_code, postings_code = _as_words(query.code), _as_words(database.code[order])
    first = np.searchsorted(postings_word, query.word, side="left")
    count = np.searchsorted(postings_word, query.word, side="right") - first
    weight = _weight_of_distance(32 * width, alpha)

    result = np.zeros((query.num_images, database.num_images))
    for low, high in _blocks(count, max(_PAIRS_AT_ONCE // max(query_code.shape[1], 1), 1)):
        posting, entry = _expand(first[low:high], count[low:high])
        distance = np.bitwise_count(query_code[low:high][entry] ^ postings_code[posting]).sum(axis=1, dtype=np.int32)
        top = int(query.image[low])
        rows = int(query.image[high - 1]) + 1 - top
        cell = (query.image[low:high].astype(np.int64) - top)[entry] * database.num_images + postings_image[posting]
        found = np.bincount(cell, weights=weight[distance], minlength=rows * database.num_images)
        result[top : top + rows] += found.reshape(rows, database.num_images)
    norms = np.sqrt(np.outer(_entries_per_image(query), _entries_per_image(database)))
    return (result / np.maximum(norms, 1.0)).astype(np.float32)


def symmetric(scores: Float32) -> Float32:
    """Mean of both directions of square scores, and 1 of an image with itself."""
    similarity = ((scores + scores.T) / 2).astype(np.float32)
    np.fill_diagonal(similarity, 1.0)
    return similarity


def _entries_per_image(features: BinaryFeatures) -> NDArray[np.int64]:
    return np.bincount(features.image, minlength=features.num_images)


def _as_words(code: NDArray[np.uint32]) -> NDArray[np.unsignedinteger]:
    # Half as many operations on 64 bits at once, where the width allows it.
    code = np.ascontiguousarray(code)
    return code.view(np.uint64) if code.shape[1] and code.shape[1] % 2 == 0 else code


def _weight_of_distance(bits: int, alpha: float) -> NDArray[np.float64]:
    similarity = 1 - 2 * np.arange(bits + 1) / max(bits, 1)
    return np.where(similarity > 0, np.maximum(similarity, 0) ** alpha, 0.0)


def _blocks(count: NDArray[np.int64], limit: int) -> list[tuple[int, int]]:
    """Cut entries into runs whose counts sum to about `limit`; a single entry may exceed it."""
    total = np.cumsum(count)
    cuts, low = [], 0
    while low < len(count):
        done = int(total[low - 1]) if low else 0
        high = max(int(np.searchsorted(total, done + limit, side="right")), low + 1)
        cuts.append((low, high))
        low = high
    return cuts


def _expand(first: NDArray[np.int64], count: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All (first[i] … first[i] + count[i] − 1, i), one after the other."""
    entry = np.repeat(np.arange(len(count)), count)
    start = np.cumsum(count) - count
    return np.arange(len(entry)) + (first - start)[entry], entry
