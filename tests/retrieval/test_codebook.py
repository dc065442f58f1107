"""Visual words: sizes, determinism, and the search against brute force."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.retrieval.codebook import Codebook, suitable_words, training_size


@given(st.integers(0, 10**9))
def test_the_codebook_grows_with_the_collection_within_bounds(tokens: int) -> None:
    words = suitable_words(tokens)
    assert 1 <= words <= 16_384
    assert words & (words - 1) == 0
    assert words <= suitable_words(2 * tokens) <= 2 * words
    if 16 * 512 <= tokens <= 128 * 16_384:
        assert max(tokens / 128 * 0.7, 512) <= words <= max(tokens / 128 * 1.42, 512)


def test_training_is_repeatable_and_seeded() -> None:
    tokens = np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32)
    first, again = (Codebook.train(tokens, 32, seed=3).centroids for _ in range(2))
    assert first.shape == (32, 8)
    np.testing.assert_array_equal(first, again)
    assert np.abs(Codebook.train(tokens, 32, seed=4).centroids - first).max() > 1e-3


def test_training_finds_clusters() -> None:
    generator = np.random.default_rng(1)
    centres = 10 * generator.standard_normal((4, 8))
    tokens = (centres[np.arange(training_size(16)) % 4] + 0.1 * generator.standard_normal((256, 8))).astype(np.float32)
    codebook = Codebook.train(tokens, 16, seed=0)
    nearest = codebook.centroids[codebook.nearest(tokens, 1)[:, 0]]
    assert np.linalg.norm(tokens - nearest, axis=1).mean() < 0.4


@pytest.mark.parametrize(("tokens", "words"), [(1, 1), (3, 1), (40, 10), (1000, 64)])
def test_few_tokens_make_few_words(tokens: int, words: int) -> None:
    values = np.random.default_rng(2).standard_normal((tokens, 5)).astype(np.float32)
    assert len(Codebook.train(values, 64, seed=0)) == words


def test_nearest_words_are_those_of_brute_force() -> None:
    generator = np.random.default_rng(3)
    tokens, centroids = (generator.standard_normal((count, 6)).astype(np.float32) for count in (100, 40))
    distance = np.linalg.norm(tokens[:, None].astype(float) - centroids, axis=2)
    found = Codebook(centroids).nearest(tokens, 5)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.argsort(distance, axis=1)[:, :5])
    assert Codebook(centroids).nearest(tokens, 50).shape == (100, 40)
    assert Codebook(centroids).nearest(tokens[:0], 5).shape == (0, 5)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match="centroids"):
        Codebook(np.zeros((0, 4), np.float32))
    with pytest.raises(ShapeError, match="tokens"):
        Codebook.train(np.zeros((0, 4), np.float32), 4, seed=0)
    with pytest.raises(ShapeError, match=r"\[\*, 4\]"):
        Codebook(np.ones((2, 4), np.float32)).nearest(np.zeros((3, 5), np.float32), 1)


def test_a_gpu_build_of_faiss_is_used_where_it_finds_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that such a build offers, computed on the CPU."""
    tokens = np.random.default_rng(0).standard_normal((400, 16)).astype(np.float32)
    expected = Codebook.train(tokens, 32, seed=1)
    used: list[str] = []

    def to_gpus(index: object) -> object:
        used.append("train")
        return index

    def search(resources: object, queries: object, base: object, count: int) -> object:
        used.append(f"search with {resources}")
        return faiss.knn(queries, base, count)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "memory of the device", raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpus, raising=False)
    monkeypatch.setattr(faiss, "knn_gpu", search, raising=False)
    codebook = Codebook.train(tokens, 32, seed=1)
    np.testing.assert_array_equal(codebook.centroids, expected.centroids)
    np.testing.assert_array_equal(codebook.nearest(tokens, 5), expected.nearest(tokens, 5))
    assert used == ["train", "search with memory of the device"]
