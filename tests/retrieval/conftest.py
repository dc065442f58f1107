"""A small collection of places, each photographed a few times."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mast3r_sfm.types import Encoding, PixelTransform

CHANNELS = 24

MakePlaces = Callable[..., list[Encoding]]


def encoding_of(tokens: np.ndarray, attention: np.ndarray | None = None) -> Encoding:
    """An encoding with these tokens; everything else is of no interest to the retrieval."""
    return Encoding(
        tokens=tokens.astype(np.float16),
        xy=np.zeros((len(tokens), 2), np.float32),
        attention=np.arange(len(tokens), 0, -1, dtype=np.float32) if attention is None else attention,
        transform=PixelTransform(matrix=np.eye(2, 3)),
        network_size=(64, 64),
    )


@pytest.fixture
def make_places() -> MakePlaces:
    """Make photos of places: each photo sees a random part of its place's tokens, with some noise and strangers."""

    def make(photos_of_place: list[int], tokens: int = 200, seed: int = 0) -> list[Encoding]:
        generator = np.random.default_rng(seed)
        photos = []
        for photos_here in photos_of_place:
            place = generator.standard_normal((2 * tokens, CHANNELS))
            for _ in range(photos_here):
                seen = place[generator.choice(len(place), tokens, replace=False)]
                seen = seen + 0.15 * generator.standard_normal(seen.shape)
                seen[: tokens // 4] = generator.standard_normal((tokens // 4, CHANNELS))
                photos.append(encoding_of(seen / np.linalg.norm(seen, axis=1, keepdims=True)))
        return photos

    return make
