"""How similar the images of a collection are, told from their tokens.

A matrix of all similarities grows with the square of the collection. Up to a few thousand images it is simply there;
beyond, its rows are computed as they are asked for, and only the most similar images of each are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.errors import ShapeError
from mast3r_sfm.progress import Progress
from mast3r_sfm.retrieval.coded import CodedImages
from mast3r_sfm.retrieval.features import Vocabulary, describe_images, learn_vocabulary, suitable_tokens
from mast3r_sfm.retrieval.nearest import NearestImages, RunningNearest
from mast3r_sfm.retrieval.postings import PostingsBuilder
from mast3r_sfm.types import Encoding, Float32, Float64

LARGEST_MATRIX = 4096
"""Images up to which all similarities are held: 64 MB."""
NEAREST_KEPT = 100
"""Most similar images that are known of every image."""
SHOWN = 1024
"""Images of a larger collection that are shown in a matrix."""

Images = NDArray[np.integer[Any]]

_ROWS_AT_ONCE = 128
_PAIRS_AT_ONCE = 1 << 16
# Totals are sums of values rounded to this grid: exact, and so the same in any order.
_GRID = 2.0**-30


class Similarity(Protocol):
    """The similarity of every two of N images, in [0, 1]."""

    def __len__(self) -> int:
        """N."""

    def rows(self, images: Images) -> Float32:
        """[R, N] how similar all images are to each of some; an image to itself 1."""

    def columns(self, images: Images) -> Float32:
        """[R, N] how similar each of some images is to all; the same as `rows` where the similarity is symmetric."""

    def mutual(self, images: Images) -> Float32:
        """[R, N] the mean of rows and columns."""

    def scores(self, pairs: Images) -> Float32:
        """[P] the mean of both directions for pairs [P, 2]."""

    def totals(self) -> Float64:
        """[N] sum of the mutual similarities of each image to all others."""

    def nearest(self, count: int) -> NearestImages:
        """The `count` most similar images of each by its row, itself left out; `count` is capped at N − 1."""


class DenseSimilarity:
    """A matrix that is there; it need not be symmetric."""

    def __init__(self, values: NDArray[np.floating[Any]]) -> None:
        """Of [N, N] similarities.

        Raises:
            ShapeError: the matrix is not square, or holds NaN or infinite values.
        """
        if values.ndim != 2 or values.shape[0] != values.shape[1]:
            raise ShapeError(f"similarity has shape {values.shape}, expected [N, N]")
        if not np.isfinite(values).all():
            raise ShapeError("similarity holds NaN or infinite values")
        self.values: Float32 = np.asarray(values, np.float32)
        """[N, N]."""

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, images: Images) -> Float32:
        """As in `Similarity`."""
        rows: Float32 = self.values[images]
        return rows

    def columns(self, images: Images) -> Float32:
        """As in `Similarity`."""
        return self.values[:, images].T

    def mutual(self, images: Images) -> Float32:
        """As in `Similarity`."""
        return (self.rows(images) + self.columns(images)) / np.float32(2)

    def scores(self, pairs: Images) -> Float32:
        """As in `Similarity`."""
        first, second = pairs.T
        scores: Float32 = (self.values[first, second] + self.values[second, first]) / np.float32(2)
        return scores

    def totals(self) -> Float64:
        """As in `Similarity`."""
        total = np.zeros(len(self))
        for part in _slices(len(self), _ROWS_AT_ONCE):
            values = _on_grid(self.values[part])
            total += values.sum(axis=0)
            total[part] += values.sum(axis=1)
        return (total / 2 - _on_grid(self.values.diagonal())) * _GRID

    def nearest(self, count: int) -> NearestImages:
        """As in `Similarity`."""
        found = RunningNearest(len(self), count)
        for part in _slices(len(self), _ROWS_AT_ONCE):
            found.add(part, slice(0, len(self)), self.values[part])
        return found.result()


class StreamedSimilarity:
    """Rows that are computed as they are asked for, and what one pass over all of them told; symmetric."""

    def __init__(self, images: CodedImages, *, kept: int = NEAREST_KEPT) -> None:
        """One pass over all similarities, of which the `kept` most similar images of each are remembered."""
        self._images = images
        self._totals, self._nearest = _summarise(images, kept)

    def __len__(self) -> int:
        return len(self._images)

    def rows(self, images: Images) -> Float32:
        """As in `Similarity`."""
        return self._images.rows(images)

    def columns(self, images: Images) -> Float32:
        """As in `Similarity`."""
        return self._images.rows(images)

    def mutual(self, images: Images) -> Float32:
        """As in `Similarity`."""
        return self._images.rows(images)

    def totals(self) -> Float64:
        """As in `Similarity`."""
        return self._totals

    def nearest(self, count: int) -> NearestImages:
        """As in `Similarity`; at no cost up to the number that is kept, and otherwise at that of another pass."""
        if min(count, len(self) - 1) > self._nearest.image.shape[1]:
            return _summarise(self._images, count)[1]
        return self._nearest.first(count)

    def scores(self, pairs: Images) -> Float32:
        """As in `Similarity`; what is not among the nearest images is computed row by row."""
        scores = np.empty(len(pairs), np.float32)
        known = np.zeros(len(pairs), bool)
        for part in _slices(len(pairs), _PAIRS_AT_ONCE):
            for source, target in (pairs[part].T, pairs[part, ::-1].T):
                same = self._nearest.image[source] == target[:, None]
                pair, place = np.nonzero(same)
                scores[part][pair] = self._nearest.score[source[pair], place]
                known[part][pair] = True
        left = np.flatnonzero(~known)
        # Of the two rows that hold a score, the one that holds more of those that are asked for.
        often = np.bincount(pairs[left].ravel(), minlength=len(self))
        source, target = np.where(often[pairs[left, :1]] >= often[pairs[left, 1:]], pairs[left], pairs[left, ::-1]).T
        order = np.argsort(source, kind="stable")
        rows, first = np.unique(source[order], return_index=True)
        bounds = np.append(first, len(order))
        for part in _slices(len(rows), self._images.rows_at_once):
            asked = order[bounds[part.start] : bounds[part.stop]]
            block = self.rows(rows[part])
            scores[left[asked]] = block[np.searchsorted(rows[part], source[asked]), target[asked]]
        return scores


def as_similarity(similarity: Similarity | NDArray[np.floating[Any]]) -> Similarity:
    """A matrix [N, N] as what it stands for.

    Raises:
        ShapeError: as `DenseSimilarity`.
    """
    return DenseSimilarity(similarity) if isinstance(similarity, np.ndarray) else similarity


def measure_similarity(
    encodings: Sequence[Encoding],
    config: PairsConfig,
    *,
    model_tokens: int,
    seed: int,
    progress: Progress,
    threads: int = 1,
    vocabulary: Vocabulary | None = None,
) -> Similarity:
    """Similarity of every two images.

    Args:
        encodings: one per image; may read them from disk, each is asked for twice at most and none is kept.
        config: settings of the stage.
        model_tokens: tokens of highest attention that suit the model, used where the config leaves it open.
        seed: of the tokens that the codebook is learnt from, and of its first centroids.
        progress: told of two steps per image.
        threads: that score images side by side; the result does not depend on their number.
        vocabulary: what tokens are compared by; None: it is learnt from the collection.

    Returns:
        A symmetric similarity, as a matrix up to `LARGEST_MATRIX` images. An image without tokens is similar to
        nothing but itself.

    Raises:
        ShapeError: the encodings differ in their number of channels.
    """
    if vocabulary is not None:
        progress.advance(len(encodings))  # the look at each image that learning takes
    else:
        vocabulary = learn_vocabulary(
            encodings, config, config.tokens_per_image or suitable_tokens(model_tokens, len(encodings)), seed, progress
        )
    images = _code_images(encodings, vocabulary, progress, threads)
    if len(images) > LARGEST_MATRIX:
        return StreamedSimilarity(images, kept=max(NEAREST_KEPT, config.neighbours))
    values = np.empty((len(images), len(images)), np.float32)
    for first, block in images.lower_blocks():
        stop = first + len(block)
        values[first:stop, :stop] = block
        values[:first, first:stop] = block[:, :first].T
    return DenseSimilarity(values)


def shown_matrix(similarity: Similarity) -> Float32:
    """A matrix small enough to be stored and drawn.

    Returns:
        [M, M] mutual similarity of all images, or of `SHOWN`, evenly spaced, where these are more than
        `LARGEST_MATRIX`.
    """
    count = len(similarity)
    shown = np.arange(count) if count <= LARGEST_MATRIX else np.linspace(0, count - 1, SHOWN).round().astype(np.int64)
    matrix = np.empty((len(shown), len(shown)), np.float32)
    for part in _slices(len(shown), _ROWS_AT_ONCE):
        matrix[part] = similarity.mutual(shown[part])[:, shown]
    return matrix


def _code_images(
    encodings: Sequence[Encoding], vocabulary: Vocabulary | None, progress: Progress, threads: int
) -> CodedImages:
    words = len(vocabulary.codebook) if vocabulary else 0
    database, query = PostingsBuilder(words), PostingsBuilder(words)
    if vocabulary is None:
        progress.warn("no photo shows anything to compare it with others by; pairs are chosen without similarity")
        nothing = np.zeros(0, np.int32)
        for builder in (database, query):
            builder.add(len(encodings), nothing, nothing, np.zeros((0, 1), np.uint32))
        progress.advance(len(encodings))
    else:
        for as_database, as_query in describe_images(encodings, vocabulary, progress):
            for builder, part in ((database, as_database), (query, as_query)):
                builder.add(part.num_images, part.image, part.word, part.code)
    return CodedImages(database=database.build(), query=query.build(), threads=threads)


def _summarise(images: CodedImages, kept: int) -> tuple[Float64, NearestImages]:
    """The totals and the nearest images, each similarity computed once."""
    total = np.zeros(len(images))
    nearest = RunningNearest(len(images), kept)
    for low, block in images.lower_blocks():
        high = low + len(block)
        values = _on_grid(block)
        total[low:high] += values.sum(axis=1) - values[np.arange(high - low), np.arange(low, high)]
        total[:low] += values[:, :low].sum(axis=0)
        nearest.add(slice(low, high), slice(0, high), block)
        nearest.add(slice(0, low), slice(low, high), block[:, :low].T)
    return total * _GRID, nearest.result()


def _on_grid(values: Float32) -> Float64:
    return np.rint(values.astype(np.float64) / _GRID)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(low, min(low + size, count)) for low in range(0, count, size))
