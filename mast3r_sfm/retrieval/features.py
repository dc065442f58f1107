"""What ASMK compares: local features of the strongest tokens of each image, in visual words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.errors import ShapeError
from mast3r_sfm.progress import Progress
from mast3r_sfm.retrieval.asmk import DATABASE_WORDS, QUERY_WORDS, BinaryFeatures, describe
from mast3r_sfm.retrieval.codebook import Codebook, suitable_words, training_size
from mast3r_sfm.retrieval.whitening import TokenMoments, Whitening
from mast3r_sfm.types import Encoding, Float32, Int32

# Token values taken in hand at once: bounds the memory, and makes matrix products large enough to be fast.
_VALUES_AT_ONCE = 1 << 20


# Measured on 308 photos of 17 places (benchmarks/retrieval_purity.py): 2,000 of XFeat's tokens find 98.4 % of the same
# place, 1,000 find 98.0 %, and 4,000 no more. Large collections get fewer, since scoring grows with the square.
_MOST_TOKENS = 1_000_000
_FEWEST_PER_IMAGE = 300


class LocalFeatures(Protocol):
    """Which tokens of an image are compared, and as what."""

    def of(self, encoding: Encoding) -> Float32:
        """The local features [K, D] of one image."""
        ...


@dataclass(frozen=True, kw_only=True)
class WhitenedTokens:
    """The tokens that the model itself finds most important, whitened; implements `LocalFeatures`."""

    count: int
    """Tokens of highest attention that describe an image."""
    whitening: Whitening

    def of(self, encoding: Encoding) -> Float32:
        """The local features [K, D] of one image."""
        return self.whitening.apply(encoding.tokens[strongest_tokens(encoding, self.count)])


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """How tokens become visual words."""

    features: LocalFeatures
    codebook: Codebook


def suitable_tokens(model_tokens: int, num_images: int) -> int:
    """How many tokens describe an image of a collection of `num_images`, where so many suit the model."""
    return min(model_tokens, max(_MOST_TOKENS // max(num_images, 1), _FEWEST_PER_IMAGE))


def learn_vocabulary(
    encodings: Sequence[Encoding], config: PairsConfig, count: int, seed: int, progress: Progress
) -> Vocabulary | None:
    """First look at the images: whitening and codebook from the collection itself.

    Args:
        encodings: one per image; each is asked for once.
        config: the size of the codebook.
        count: tokens of highest attention that describe an image.
        seed: of the tokens that the codebook is learnt from, and of its first centroids.
        progress: told of one step per image.

    Returns:
        None where the tokens do not differ, or there are none.

    Raises:
        ShapeError: the encodings differ in their number of channels.
    """
    planned = config.codebook_words or suitable_words(count * len(encodings))
    whitening, sample, total = _learn(encodings, count, training_size(planned), seed, progress)
    if not sample.size or not whitening.projection.size:
        return None
    # Photos with little texture have fewer tokens than were planned for.
    words = config.codebook_words or suitable_words(total)
    codebook = Codebook.train(whitening.apply(sample), words, seed=seed)
    progress.note(f"photos are compared by {total:,} tokens in {len(codebook):,} visual words")
    return Vocabulary(features=WhitenedTokens(count=count, whitening=whitening), codebook=codebook)


def describe_images(
    encodings: Sequence[Encoding], vocabulary: Vocabulary, progress: Progress
) -> Iterator[tuple[BinaryFeatures, BinaryFeatures]]:
    """A few images at a time: what each is as an image of the database, and as a query; each takes one step."""
    codebook = vocabulary.codebook
    for local, image, images in _runs(encodings, vocabulary.features.of, progress):
        words = codebook.nearest(local, QUERY_WORDS)
        database = describe(local, image, words[:, :DATABASE_WORDS], codebook.centroids, images)
        yield database, describe(local, image, words, codebook.centroids, images)


def strongest_tokens(encoding: Encoding, count: int) -> NDArray[np.int64]:
    """Indices of the `count` tokens of highest attention, highest first; of equals, the earlier one first."""
    return np.argsort(-encoding.attention, kind="stable")[:count]


def _learn(
    encodings: Sequence[Encoding], count: int, sample_size: int, seed: int, progress: Progress
) -> tuple[Whitening, NDArray[np.float16], int]:
    """First look at the images: the whitening of all tokens, about `sample_size` of them, and their number."""

    def strongest(encoding: Encoding) -> NDArray[np.float16]:
        return encoding.tokens[strongest_tokens(encoding, count)]

    generator = np.random.default_rng(seed)
    per_image = -(-sample_size // max(len(encodings), 1))
    moments = TokenMoments(0)
    sample: list[NDArray[np.float16]] = []
    for tokens, _, images in _runs(encodings, strongest, progress):
        if not sample:
            moments = TokenMoments(tokens.shape[1])
        moments.add(tokens)
        chosen = generator.choice(len(tokens), min(per_image * images, len(tokens)), replace=False)
        sample.append(tokens[np.sort(chosen)])
    learnt_from = np.concatenate(sample) if sample else np.zeros((0, 0), np.float16)
    return moments.whitening(), learnt_from, moments.count


def _runs(
    encodings: Sequence[Encoding], features_of: Callable[[Encoding], NDArray[Any]], progress: Progress
) -> Iterator[tuple[NDArray[Any], Int32, int]]:
    """Features [T, C] of as many consecutive images as fit in hand, [T] the image of each, and how many images."""
    parts: list[NDArray[Any]] = []
    channels = None
    for index in range(len(encodings)):
        encoding = encodings[index]
        channels = channels or encoding.tokens.shape[1]
        if encoding.tokens.shape[1] != channels:
            raise ShapeError(
                f"image {index} has tokens of {encoding.tokens.shape[1]} channels, the first of {channels}"
            )
        parts.append(features_of(encoding))
        if index + 1 == len(encodings) or sum(part.size for part in parts) >= _VALUES_AT_ONCE:
            image = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
            yield np.concatenate(parts), image, len(parts)
            progress.advance(len(parts))
            parts = []
