"""Binary ASMK: aggregated selective match kernels over visual words.

Source: Tolias, Avrithis and Jégou, "To aggregate or not to aggregate: selective match kernels for image search",
ICCV 2013. Per image and word, the residuals of the tokens to the word are summed and binarised by sign. Two images are
as similar as the codes they have in words both see: a pair of codes with share h of differing bits counts
max(0, 1 − 2h)^α. No inverse document frequency.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.retrieval.postings import Entries, Postings, PostingsBuilder, overlap, planes_of, weight_of_distance
from mast3r_sfm.types import Float32, Float64, Int32, Int64

ALPHA = 3.0
DATABASE_WORDS = 1
"""Words per token of a database image."""
QUERY_WORDS = 5
"""Words per token of a query image."""


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
    listed = invert(database, 1 + max(query.word.max(initial=-1), database.word.max(initial=-1)))
    entries = Entries(
        num_images=query.num_images,
        image=query.image.astype(np.int64),
        word=query.word,
        code=planes_of(query.code),
    )
    weight = weight_of_distance(listed.bits, alpha)
    total = overlap(entries, listed, weight, listed.start[1:], database.num_images)
    asked = np.bincount(query.image, minlength=query.num_images)
    return normalise(total, asked, listed.entries_per_image()).astype(np.float32)


def invert(features: BinaryFeatures, num_words: int) -> Postings:
    """The inverted file of all images of `features`."""
    builder = PostingsBuilder(num_words)
    builder.add(features.num_images, features.image, features.word, features.code)
    return builder.build()


def normalise(total: Float64, query_entries: Int64, database_entries: Int64) -> Float64:
    """Sums [Q, N] over shared words, divided by the geometric mean of the words [Q] and [N] that both sides see."""
    # One root of an exact product, so that both ends of a pair get the same.
    return total / np.sqrt(np.maximum(np.outer(query_entries, database_entries), 1))
