"""Visual words: k-means centroids of whitened tokens, and which words a token is nearest to. The home of faiss."""

from __future__ import annotations

from typing import Self

import faiss
import numpy as np

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Float32, Int32

# Measured on 308 photos of 17 places (benchmarks/retrieval_purity.py): more rounds, more points or more words change
# the order of the nearest images by less than another seed does, and cost up to ten times the time.
_ITERATIONS = 3
_POINTS_PER_WORD = 16
_TOKENS_PER_WORD = 128
# With fewer words, so many tokens of an image share one that their sum says little: of 25 photos of a façade, the five
# nearest hold 95 % of the matches that five images can hold with 64 words, 98 % with 512.
_FEWEST_WORDS = 512
_MOST_WORDS = 16_384
# A word learnt from fewer tokens is one of them rather than their mean.
_FEWEST_POINTS_PER_WORD = 4


def suitable_words(num_tokens: int) -> int:
    """Size of the codebook for a collection of `num_tokens` tokens, a power of two.

    It grows with the collection, which keeps the images per word, and so the work per image, constant; but small
    collections get as many words as their tokens can teach, up to 512.
    """
    wanted = min(max(num_tokens / _TOKENS_PER_WORD, _FEWEST_WORDS), _MOST_WORDS, num_tokens / _POINTS_PER_WORD)
    return int(2 ** round(np.log2(max(wanted, 1))))


def training_size(words: int) -> int:
    """How many tokens are enough to learn so many words from."""
    return words * _POINTS_PER_WORD


class Codebook:
    """The centroids [K, D] and a search over them."""

    def __init__(self, centroids: Float32) -> None:
        if centroids.ndim != 2 or not centroids.size:
            raise ShapeError(f"a codebook needs centroids [K, D], not {centroids.shape}")
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        # Only the GPU builds of faiss find any.
        self._gpu = faiss.StandardGpuResources() if faiss.get_num_gpus() else None

    def __len__(self) -> int:
        return len(self.centroids)

    @classmethod
    def train(cls, tokens: Float32, words: int, *, seed: int) -> Self:
        """Lloyd's k-means from randomly chosen tokens; the result does not depend on the number of threads.

        Args:
            tokens: [T, D] whitened; all are used, so the caller bounds their number (`training_size`).
            words: number of centroids; capped at a word per four tokens.
            seed: of the choice of the first centroids.

        Raises:
            ShapeError: there is no token to learn from.
        """
        if tokens.ndim != 2 or not tokens.size:
            raise ShapeError(f"a codebook is learnt from tokens [T, D], not {tokens.shape}")
        settings = faiss.ClusteringParameters()
        settings.seed = seed
        settings.niter = _ITERATIONS
        settings.min_points_per_centroid = 1
        settings.max_points_per_centroid = len(tokens)
        dimension = tokens.shape[1]
        capped = max(min(words, len(tokens) // _FEWEST_POINTS_PER_WORD), 1)
        clustering = faiss.Clustering(dimension, capped, settings)
        index: faiss.Index = faiss.IndexFlatL2(dimension)
        if faiss.get_num_gpus():
            index = faiss.index_cpu_to_all_gpus(index)
        clustering.train(np.ascontiguousarray(tokens, dtype=np.float32), index)
        return cls(faiss.vector_to_array(clustering.centroids).reshape(capped, dimension))

    def nearest(self, tokens: Float32, count: int) -> Int32:
        """The `count` words nearest to each token by Euclidean distance.

        Args:
            tokens: [T, D].
            count: capped at K.

        Returns:
            [T, count] words, nearest first.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.centroids.shape[1]:
            raise ShapeError(f"tokens have shape {tokens.shape}, expected [*, {self.centroids.shape[1]}]")
        if not len(tokens):
            return np.zeros((0, min(count, len(self))), np.int32)
        tokens, count = np.ascontiguousarray(tokens, dtype=np.float32), min(count, len(self))
        # An index would hold the centroids a second time, and search them in the same way.
        if self._gpu is None:
            found = faiss.knn(tokens, self.centroids, count)[1]
        else:
            found = faiss.knn_gpu(self._gpu, tokens, self.centroids, count)[1]
        return np.asarray(found, dtype=np.int32)
