"""The pairs stage: tokens → whitening → codebook → binary ASMK → view graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.errors import ShapeError
from mast3r_sfm.progress import Progress, steps
from mast3r_sfm.retrieval.asmk import DATABASE_WORDS, QUERY_WORDS, BinaryFeatures, describe, score, symmetric
from mast3r_sfm.retrieval.codebook import Codebook, suitable_words, training_size
from mast3r_sfm.retrieval.graph import view_graph
from mast3r_sfm.retrieval.whitening import TokenMoments, Whitening
from mast3r_sfm.types import Encoding, Float32, Int32, Reason, ViewGraph

# Token values taken in hand at once: bounds the memory, and makes matrix products large enough to be fast.
_VALUES_AT_ONCE = 1 << 20


def build_view_graph(
    encodings: Sequence[Encoding], config: PairsConfig, *, model_tokens: int, seed: int, progress: Progress
) -> tuple[ViewGraph, Float32]:
    """Decide which pairs of images are to be matched.

    Also a collection small enough to be matched exhaustively gets its similarity from ASMK: its codebook is small, so
    that this costs about a hundredth of the matching, and the score of a pair means the same everywhere.

    Args:
        encodings: one per image; may read them from disk, each is asked for twice and none is kept.
        config: settings of the stage.
        model_tokens: tokens of highest attention that suit the model, used where the config leaves it open.
        seed: of the tokens that the codebook is learnt from, and of its first centroids.
        progress: told of two steps per image, and of what was decided.

    Returns:
        The graph and the symmetric similarity [N, N] in [0, 1] with ones on the diagonal. An image without tokens is
        similar to nothing.

    Raises:
        ShapeError: the encodings differ in their number of channels.
    """
    with steps(progress, "pairs", 2 * len(encodings), "image"):
        similarity = _similarity(encodings, config, config.tokens_per_image or model_tokens, seed, progress)
        graph = view_graph(similarity, config)
        progress.note(_summary(graph, config))
    return graph, similarity


def strongest_tokens(encoding: Encoding, count: int) -> NDArray[np.int64]:
    """Indices of the `count` tokens of highest attention, highest first; of equals, the earlier one first."""
    return np.argsort(-encoding.attention, kind="stable")[:count]


def _similarity(
    encodings: Sequence[Encoding], config: PairsConfig, count: int, seed: int, progress: Progress
) -> Float32:
    planned = config.codebook_words or suitable_words(count * len(encodings))
    whitening, sample, total = _learn(encodings, count, training_size(planned), seed, progress)
    if not sample.size or not whitening.projection.size:
        progress.warn("no photo shows anything to compare it with others by; pairs are chosen without similarity")
        progress.advance(len(encodings))
        return np.eye(len(encodings), dtype=np.float32)
    # Photos with little texture have fewer tokens than were planned for.
    words = config.codebook_words or suitable_words(total)
    codebook = Codebook.train(whitening.apply(sample), words, seed=seed)
    progress.note(f"photos are compared by {total:,} tokens in {len(codebook):,} visual words")
    database, query = _features(encodings, count, whitening, codebook, progress)
    return symmetric(score(query, database))


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


def _features(
    encodings: Sequence[Encoding], count: int, whitening: Whitening, codebook: Codebook, progress: Progress
) -> tuple[BinaryFeatures, BinaryFeatures]:
    """Second look at the images: what each is as an image of the database, and as a query."""
    database, query = [], []
    for tokens, image, images in _runs(encodings, count, progress):
        white = whitening.apply(tokens)
        words = codebook.nearest(white, QUERY_WORDS)
        database.append(describe(white, image, words[:, :DATABASE_WORDS], codebook.centroids, images))
        query.append(describe(white, image, words, codebook.centroids, images))
    return BinaryFeatures.concatenate(database), BinaryFeatures.concatenate(query)


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


def _summary(graph: ViewGraph, config: PairsConfig) -> str:
    pairs, every = len(graph.pairs), graph.num_images * (graph.num_images - 1) // 2
    if pairs == every:
        return f"all {pairs:,} pairs of {graph.num_images:,} photos are matched"
    bridges = int((graph.reason == Reason.BRIDGE).sum())
    text = (
        f"{pairs:,} of {every:,} pairs are matched: {min(config.keyframes, graph.num_images)} keyframes with each "
        f"other, every photo with its {config.neighbours} most similar"
    )
    return f"{text}, and {bridges} bridges between parts that have nothing else in common" if bridges else text
