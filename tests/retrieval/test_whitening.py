"""Whitening: against numpy on all tokens at once, and on degenerate collections."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.retrieval.whitening import TokenMoments, Whitening


def _tokens(seed: int, count: int, channels: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    spread = np.linalg.qr(generator.standard_normal((channels, channels)))[0] * np.linspace(0.5, 2, channels)
    return 5 + generator.standard_normal((count, channels)) @ spread.T


@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 300), max_size=5))
def test_the_result_does_not_depend_on_how_the_tokens_come(seed: int, cuts: list[int]) -> None:
    tokens = _tokens(seed, 300, 6)
    moments = TokenMoments(6)
    for part in np.split(tokens, sorted(cuts)):
        moments.add(part)
    whitening = moments.whitening()
    assert moments.count == 300
    np.testing.assert_allclose(whitening.mean, tokens.mean(axis=0), rtol=1e-10)
    white = (tokens - whitening.mean) @ whitening.projection
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(6), atol=1e-9)
    np.testing.assert_allclose(whitening.apply(tokens), white, atol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_shrinkage_leaves_a_power_of_the_variance(shrinkage: float) -> None:
    tokens = _tokens(1, 500, 5)
    moments = TokenMoments(5)
    moments.add(tokens)
    variance = np.sort(np.linalg.eigvalsh(np.cov(tokens.T, bias=True)))[::-1]
    projection = moments.whitening(shrinkage).projection
    white = (tokens - tokens.mean(axis=0)) @ projection
    np.testing.assert_allclose(white.var(axis=0), variance ** (1 - shrinkage), rtol=1e-8)


def test_directions_have_a_fixed_sign() -> None:
    tokens = _tokens(2, 100, 7)
    moments, mirrored = TokenMoments(7), TokenMoments(7)
    moments.add(tokens)
    mirrored.add(-tokens)
    projection = moments.whitening().projection
    np.testing.assert_allclose(mirrored.whitening().projection, projection, rtol=1e-8)
    assert (projection[np.abs(projection).argmax(axis=0), np.arange(7)] > 0).all()


def test_directions_without_variance_are_dropped() -> None:
    tokens = _tokens(3, 40, 4) @ np.eye(4, 9)
    moments = TokenMoments(9)
    moments.add(tokens)
    assert moments.whitening().projection.shape == (9, 4)
    assert np.isfinite(moments.whitening().apply(tokens)).all()


@pytest.mark.parametrize("tokens", [np.zeros((0, 3)), np.ones((5, 3)), np.ones((1, 3))])
def test_nothing_to_learn_gives_no_direction(tokens: np.ndarray) -> None:
    moments = TokenMoments(3)
    moments.add(tokens)
    assert moments.whitening().projection.shape == (3, 0)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[\*, 3\]"):
        TokenMoments(3).add(np.zeros((2, 4)))
    with pytest.raises(ShapeError, match="projection"):
        Whitening(mean=np.zeros(3), projection=np.zeros((4, 4)))
    with pytest.raises(ShapeError, match=r"\[\*, 3\]"):
        Whitening(mean=np.zeros(3), projection=np.eye(3)).apply(np.zeros((2, 4)))
