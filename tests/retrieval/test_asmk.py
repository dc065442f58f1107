"""Binary ASMK against a plain reference that loops over images, words and bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.retrieval import postings
from mast3r_sfm.retrieval.asmk import BinaryFeatures, binarise, describe, score

Codes = dict[int, list[bool]]


def _plain_codes(tokens: np.ndarray, words: np.ndarray, centroids: np.ndarray) -> Codes:
    sums: dict[int, np.ndarray] = {}
    for token, assigned in zip(tokens.astype(float), words, strict=True):
        for word in assigned:
            sums[int(word)] = sums.get(int(word), 0) + token - centroids[word]
    return {word: [bool(value > 0) for value in total] for word, total in sums.items()}


def _plain_score(query: Codes, database: Codes, alpha: float) -> float:
    if not query or not database:
        return 0.0
    total = 0.0
    for word in query.keys() & database.keys():
        differ = sum(a != b for a, b in zip(query[word], database[word], strict=True))
        bits = -(-len(query[word]) // 32) * 32
        agreement = 1 - 2 * differ / bits
        total += agreement**alpha if agreement > 0 else 0.0
    return total / (len(query) ** 0.5 * len(database) ** 0.5)


def _collection(seed: int, images: int, dimension: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, the image of each, 3 words of each, centroids; some images have no tokens."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 30, images)
    image = np.repeat(np.arange(images, dtype=np.int32), counts)
    tokens, centroids = (generator.standard_normal((n, dimension)).astype(np.float32) for n in (len(image), 12))
    words = np.argsort(generator.random((len(image), 12)), axis=1)[:, :3].astype(np.int32)
    return tokens, image, words, centroids


@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 6),
    dimension=st.sampled_from([1, 31, 32, 48, 64, 80]),
    alpha=st.sampled_from([1.0, 3.0]),
)
def test_scores_are_those_of_the_plain_reference(seed: int, images: int, dimension: int, alpha: float) -> None:
    tokens, image, words, centroids = _collection(seed, images, dimension)
    query = describe(tokens, image, words, centroids, images)
    database = describe(tokens, image, words[:, :1], centroids, images)
    found = score(query, database, alpha=alpha)

    plain_query = [_plain_codes(tokens[image == i], words[image == i], centroids) for i in range(images)]
    plain_database = [_plain_codes(tokens[image == i], words[image == i, :1], centroids) for i in range(images)]
    expected = [[_plain_score(q, d, alpha) for d in plain_database] for q in plain_query]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.min() >= 0
    assert found.max() <= 1


def test_the_size_of_a_block_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, image, words, centroids = _collection(5, 9, 64)
    features = describe(tokens, image, words, centroids, 9)
    whole = score(features, features)
    for limit, short in ((1, 0), (7, 3), (50, 100)):
        monkeypatch.setattr(postings, "_PAIRS_AT_ONCE", limit)
        monkeypatch.setattr(postings, "_SHORT", short)
        np.testing.assert_array_equal(score(features, features), whole)


@pytest.mark.parametrize("dimension", [64, 1024])
def test_an_image_is_fully_similar_to_itself_and_not_at_all_to_its_mirror(dimension: int) -> None:
    tokens, image, words, centroids = _collection(6, 4, dimension)
    features = describe(tokens, image, words, centroids, 4)
    mirrored = BinaryFeatures(num_images=4, image=features.image, word=features.word, code=~features.code)
    np.testing.assert_allclose(score(features, features).diagonal(), 1.0, atol=1e-6)
    np.testing.assert_array_equal(score(features, mirrored).diagonal(), 0.0)


@pytest.mark.parametrize("bits", [32, 96, 1024])
@pytest.mark.parametrize("alpha", [1.0, 2.5, 3.0])
def test_weights_are_such_that_sums_are_exact(bits: int, alpha: float) -> None:
    weight = postings.weight_of_distance(bits, alpha)
    exact = [max(1 - 2 * differ / bits, 0) ** alpha for differ in range(bits + 1)]
    np.testing.assert_allclose(weight, exact, rtol=0, atol=2.0**-31)
    np.testing.assert_array_equal(weight * 2**30 % 1, 0)
    assert weight[0] == 1


def test_images_without_tokens_are_similar_to_nothing() -> None:
    empty = describe(
        np.zeros((0, 8), np.float32), np.zeros(0, np.int32), np.zeros((0, 2), np.int32), np.ones((3, 8), np.float32), 2
    )
    np.testing.assert_array_equal(score(empty, empty), np.zeros((2, 2)))


def test_bits_are_packed_from_the_highest() -> None:
    values = np.full((1, 40), -1.0, np.float32)
    values[0, [0, 31, 33]] = 0.5
    values[0, 5] = 0.0
    np.testing.assert_array_equal(binarise(values), [[0x8000_0001, 0x4000_0000]])


def test_features_of_unequal_length_are_refused() -> None:
    with pytest.raises(ShapeError, match="3 codes"):
        BinaryFeatures(
            num_images=1,
            image=np.zeros(2, np.int32),
            word=np.zeros(2, np.int32),
            code=np.zeros((3, 1), np.uint32),
        )
