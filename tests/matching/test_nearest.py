"""Mutual nearest neighbours: the fast kernel against the plain one, on anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mast3r_sfm.matching import nearest
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


@pytest.mark.parametrize("kind", ["random", "tied"])
def test_without_onednn_it_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    pair = descriptors(kind, rng, 300), descriptors(kind, rng, 200)
    with_it, _ = both(*pair, 0.0)
    monkeypatch.setattr(nearest, "_ONEDNN", False)
    without, expected = both(*pair, 0.0)
    for one, two, plain in zip(with_it, without, expected, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, plain, rtol=1e-5)


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


@settings(max_examples=100)
@given(st.sampled_from(["random", "smooth"]), COUNTS, COUNTS, st.integers(0, 10_000))
def test_swapping_the_images_changes_nothing(kind: str, a: int, b: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # In general position: of equal neighbours, which one counts depends on the order.
    first, second = (unit(descriptors(kind, rng, count) + rng.normal(0, 1e-2, (count, 8))) for count in (a, b))
    found = mutual_nearest(torch.from_numpy(first), torch.from_numpy(second), -1.0)
    swapped = mutual_nearest(torch.from_numpy(second), torch.from_numpy(first), -1.0)
    order = np.argsort(swapped.pairs[:, 1])
    np.testing.assert_array_equal(swapped.pairs[order][:, ::-1], found.pairs)
    np.testing.assert_allclose(swapped.ratio[order], found.ratio, atol=1e-3)


def unit(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def directions(*angles_deg: float) -> NDArray[np.float32]:
    """Descriptors in the plane; two at an angle a are 2·sin(a/2) apart."""
    angles = np.radians(angles_deg)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_the_ratio_is_of_distances_and_the_worse_of_both_directions() -> None:
    first, second = directions(0, 70, 100), directions(10, 130)
    for one, other in ((first, second), (second, first)):
        for found in both(one, other, -1.0):
            # 0 and 10 match; the second nearest of 0 is at 130, of 10 at 60. 100 and 130 match; second of 100: 90, of
            # 130: 60.
            expected = np.sin(np.radians([5, 15])) / np.sin(np.radians([30, 30]))
            np.testing.assert_allclose(found.ratio, expected, rtol=1e-4)


@pytest.mark.parametrize("duplicated", ["first", "second", "both"])
def test_a_descriptor_that_stands_twice_is_not_distinct(duplicated: str) -> None:
    rng = np.random.default_rng(0)
    first = unit(rng.normal(size=(20, 16)))
    second = unit(first + 0.1 * rng.normal(size=first.shape))
    doubled = {"first": (first, None), "second": (None, second), "both": (first, second)}[duplicated]
    one, other = (
        values if again is None else np.concatenate([values, again[:5]])
        for values, again in zip((first, second), doubled, strict=True)
    )
    for found in both(one, other, 0.5):
        is_doubled = np.isin(found.pairs[:, 0] % 20, np.arange(5))
        assert is_doubled.sum() >= 5
        np.testing.assert_allclose(found.ratio[is_doubled], 1, atol=1e-3)
        assert found.ratio[~is_doubled].max() < 0.7


def test_descriptors_without_any_rival_are_distinct() -> None:
    for found in both(directions(0), directions(90), -1.0):
        np.testing.assert_array_equal(found.pairs, [[0, 0]])
        # Compared with the opposite descriptor, the most distant there is.
        np.testing.assert_allclose(found.ratio, [np.sqrt(2) / 2], rtol=1e-5)
    for found in both(directions(0), directions(0), -1.0):
        assert 0 < found.ratio[0] < 1e-3  # not 0/0
    # One in one image only: the other direction has no rival.
    for found in both(directions(0), directions(20, 180), -1.0):
        np.testing.assert_allclose(found.ratio, [np.sin(np.radians(10)) / 1], rtol=1e-4)
