"""What a model must offer; matching, alignment and mapping know no model by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.types import Encoding, LoadedImage, PairPrediction, Preparation


class ImageModel(Protocol):
    """What describes images, each by itself."""

    name: str
    """As `--model` takes it."""
    fingerprint: str
    """sha256 of weights and code version; enters the cache keys."""
    images_at_once: int
    """How many images are best handed to `encode` together, with all threads; 1: images are best encoded side by side,
    each on one thread."""
    preparation: Preparation
    """How the images that `encode` is given must be loaded; enters the cache keys."""

    def encode(self, images: Sequence[LoadedImage]) -> list[Encoding]:
        """Encode images; the result does not depend on what else is in the batch."""
        ...


class PairModel(ImageModel, Protocol):
    """A model whose encodings also serve retrieval; see `KeypointModel` and `DenseModel` for how it matches pairs."""

    retrieval_tokens: int
    """How many tokens of highest attention describe an image best."""


@runtime_checkable
class KeypointModel(PairModel, Protocol):
    """A model whose tokens are the descriptors of keypoints."""

    def match_hard(self, first: Encoding, second: Encoding) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Match a pair on which nearest neighbours find too little, with all the model has, slowly.

        Returns:
            [M, 2] indices of tokens of the first and of the second image, each used once; [M] confidence in (0, 1].
        """
        ...


@runtime_checkable
class DenseModel(PairModel, Protocol):
    """A model that predicts pointmaps and dense descriptors for a pair."""

    token_channels: int
    """Of the tokens in its encodings."""
    pairs_at_once: int
    """How many pairs of one shape are best handed to `predict` together."""

    def predict(
        self, pairs: Sequence[tuple[Encoding, Encoding]]
    ) -> Iterator[tuple[int, PairPrediction, PairPrediction]]:
        """Decode pairs in both orders.

        Yields:
            the number of a pair in `pairs`, in any order; its prediction with the first image as the reference; that
            with the second one as the reference, whose views are swapped. To be used up before the next is asked for.
        """
        ...
