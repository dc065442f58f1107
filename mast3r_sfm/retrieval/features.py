"""What ASMK compares: the strongest tokens of each image, whitened, in visual words learnt from the collection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.errors import ShapeError
from mast3r_sfm.progress import Progress
from mast3r_sfm.retrieval.asmk import DATABASE_WORDS, QUERY_WORDS, BinaryFeatures, describe
from mast3r_sfm.retrieval.codebook import Codebook, suitable_words, training_size
from mast3r_sfm.retrieval.whitening import TokenMoments, Whitening
from mast3r_sfm.types import Encoding, Int32

# Token values taken in hand at once: bounds the memory, and makes matrix products large enough to be fast.
_VALUES_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """How tokens become visual words."""

    count: int
    """Tokens of highest attention that describe an image."""
    whitening: Whitening
    codebook: Codebook


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
    return Vocabulary(count=count, whitening=whitening, codebook=codebook)


def describe_images(
    encodings: Sequence[Encoding], vocabulary: Vocabulary, progress: Progress
) -> Iterator[tuple[BinaryFeatures, BinaryFeatures]]:
    """Second look at the images, a few at a time: what each is as an image of the database, and as a query."""
    codebook = vocabulary.codebook
    for tokens, image, images in _runs(encodings, vocabulary.count, progress):
        white = vocabulary.whitening.apply(tokens)
        words = codebook.nearest(white, QUERY_WORDS)
        database = describe(white, image, words[:, :DATABASE_WORDS], codebook.centroids, images)
        yield database, describe(white, image, words, codebook.centroids, images)


def strongest_tokens(encoding: Encoding, count: int) -> NDArray[np.int64]:
    """Indices of the `count` tokens of highest attention, highest first; of equals, the earlier one first."""
    return np.argsort(-encoding.attention, kind="stable")[:count]


def _learn(
    encodings: Sequence[Encoding], count: int, sample_size: int, seed: int, progress: Progress
) -> tuple[Whitening, NDArray[np.float16], int]:
    """First look at the images: the whitening of all tokens, about `sample_size` of them, and their number."""
    generator = np.random.default_rng(seed)
    per_image = -(-sample_size // max(len(encodings), 1))
    moments = TokenMoments(0)
    sample: list[NDArray[np.float16]] = []
    for tokens, _, images in _runs(encodings, count, progress):
        if not sample:
            moments = TokenMoments(tokens.shape[1])
        moments.add(tokens)
        chosen = generator.choice(len(tokens), min(per_image * images, len(tokens)), replace=False)
        sample.append(tokens[np.sort(chosen)])
    learnt_from = np.concatenate(sample) if sample else np.zeros((0, 0), np.float16)
    return moments.whitening(), learnt_from, moments.count


def _runs(
    encodings: Sequence[Encoding], count: int, progress: Progress
) -> Iterator[tuple[NDArray[np.float16], Int32, int]]:
    """The strongest tokens [T, C] of as many consecutive images as fit in hand, [T] the image of each, their number."""
    tokens: list[NDArray[np.float16]] = []
    channels = None
    for index in range(len(encodings)):
        encoding = encodings[index]
        channels = channels or encoding.tokens.shape[1]
        if encoding.tokens.shape[1] != channels:
            raise ShapeError(
                f"image {index} has tokens of {encoding.tokens.shape[1]} channels, the first of {channels}"
            )
        tokens.append(encoding.tokens[strongest_tokens(encoding, count)])
        if index + 1 == len(encodings) or sum(part.size for part in tokens) >= _VALUES_AT_ONCE:
            image = np.repeat(np.arange(len(tokens), dtype=np.int32), [len(part) for part in tokens])
            yield np.concatenate(tokens), image, len(tokens)
            progress.advance(len(tokens))
            tokens = []
