"""Mutual nearest neighbours: the fast kernel against the plain one, on anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mast3r_sfm.matching.nearest import ROWS_PER_BLOCK, Matches, mutual_nearest, mutual_nearest_plain

COUNTS = st.integers(0, 12) | st.sampled_from([ROWS_PER_BLOCK - 1, ROWS_PER_BLOCK, ROWS_PER_BLOCK + 1, 300])


def exact(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Multiples of 1/64 in [-1, 1]: their products and sums are exact in float32, so that ties are ties everywhere."""
    return (np.round(64 * np.clip(values, -1, 1)) / 64).astype(np.float32)


def descriptors(kind: str, rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    if kind == "random":
        return exact(rng.normal(0, 0.4, (count, 8)))
    if kind == "smooth":
        along = np.linspace(0, 1, count)[:, None] + rng.uniform(0, 0.1)
        return exact(np.cos(along * np.arange(1, 9)))
    if kind == "constant":
        return np.full((count, 8), 0.25, np.float32)
    return exact(rng.integers(-1, 2, (count, 8)) / 4)  # few values: many ties


def both(first: NDArray[np.float32], second: NDArray[np.float32], least: float) -> tuple[Matches, Matches]:
    return mutual_nearest(torch.from_numpy(first), torch.from_numpy(second), least), mutual_nearest_plain(
        first, second, least
    )


@settings(max_examples=150)
@given(
    st.sampled_from(["random", "smooth", "constant", "tied"]),
    st.sampled_from(["random", "smooth", "constant", "tied"]),
    COUNTS,
    COUNTS,
    st.sampled_from([-1.0, 0.0, 0.5, 0.9, 4.0]),
    st.integers(0, 10_000),
)
def test_the_fast_kernel_is_the_plain_one(kind: str, other: str, a: int, b: int, least: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, expected = both(descriptors(kind, rng, a), descriptors(other, rng, b), least)
    np.testing.assert_array_equal(found.pairs, expected.pairs)
    np.testing.assert_array_equal(found.similarity, expected.similarity)
    # The cosines are exact here, their roots are not.
    np.testing.assert_allclose(found.ratio, expected.ratio, rtol=1e-5)


@settings(max_examples=50)
@given(COUNTS, COUNTS, st.integers(0, 10_000))
def test_it_is_a_matching_of_true_neighbours(a: int, b: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = descriptors("tied", rng, a), descriptors("tied", rng, b)
    pairs, similarity, _ = mutual_nearest(torch.from_numpy(first), torch.from_numpy(second), 0.0)
    table = first @ second.T
    assert (np.diff(pairs[:, 0]) > 0).all()  # ascending, each used once
    assert len(np.unique(pairs[:, 1])) == len(pairs)
    for (row, column), value in zip(pairs, similarity, strict=True):
        assert value == table[row, column] == table[row].max() == table[:, column].max()
        assert value >= 0


def test_a_permutation_is_found_whole() -> None:
    rng = np.random.default_rng(1)
    first = rng.normal(size=(500, 64)).astype(np.float32)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    order = rng.permutation(500)
    pairs, similarity, _ = mutual_nearest(torch.from_numpy(first), torch.from_numpy(first[order]), 0.9)
    np.testing.assert_array_equal(order[pairs[:, 1]], np.arange(500))
    np.testing.assert_allclose(similarity, 1, atol=1e-6)


def test_one_constant_set_matches_once() -> None:
    for found in both(np.full((200, 8), 0.25, np.float32), np.full((150, 8), 0.25, np.float32), 0.0):
        np.testing.assert_array_equal(found.pairs, [[0, 0]])
        np.testing.assert_array_equal(found.ratio, [1])  # another is as near


@pytest.mark.parametrize(("least", "expected"), [(0.5, 2), (0.75, 1), (0.76, 0)])
def test_pairs_at_the_threshold_stay(least: float, expected: int) -> None:
    first = np.diag([0.75, 0.5]).astype(np.float32)
    for found in both(first, np.eye(2, dtype=np.float32), least):
        assert len(found.pairs) == len(found.ratio) == expected


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 5), (5, 0)])
def test_nothing_matches_nothing(a: int, b: int) -> None:
    for pairs, similarity, ratio in both(np.ones((a, 8), np.float32), np.ones((b, 8), np.float32), -1.0):
        assert pairs.shape == (0, 2)
        assert pairs.dtype == np.int64
        assert similarity.shape == ratio.shape == (0,)
        assert similarity.dtype == ratio.dtype == np.float32
