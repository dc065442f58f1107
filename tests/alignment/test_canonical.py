"""Canonical pointmaps: running sums over the pairs of an image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mast3r_sfm.alignment.canonical import CanonicalSums, CanonicalView, depth_at_focal, focal_of_pointmap
from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Float64

HEIGHT, WIDTH, FOCAL = 36, 52, 60.0
CENTRE = np.array([WIDTH / 2, HEIGHT / 2])


def _pointmap(rng: np.random.Generator, noise: float = 0.0, scale: float = 1.0) -> Float64:
    """A hilly surface before a pinhole camera."""
    column, row = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    depth = 5 + 0.5 * np.sin(column / 9) + 0.3 * np.cos(row / 7)
    depth = scale * depth * (1 + noise * rng.standard_normal(depth.shape))
    x, y = (column - CENTRE[0]) / FOCAL * depth, (row - CENTRE[1]) / FOCAL * depth
    return np.stack([x, y, depth], axis=-1)


def _mean(maps: list[tuple[Float64, Float64]], *, align_scales: bool = True) -> CanonicalView:
    sums = CanonicalSums((HEIGHT, WIDTH), align_scales=align_scales)
    for points, confidence in maps:
        sums.add(points, confidence)
    return sums.view(CENTRE)


def _noisy(count: int, log_scale: float) -> list[tuple[Float64, Float64]]:
    rng = np.random.default_rng(0)
    scales = np.exp(log_scale * rng.standard_normal(count))
    return [(_pointmap(rng, 0.02, scale), rng.uniform(1.0, 20.0, (HEIGHT, WIDTH))) for scale in scales]


def test_one_exact_pointmap_is_its_own_mean() -> None:
    points = _pointmap(np.random.default_rng(0))
    view = _mean([(points, np.full((HEIGHT, WIDTH), 3.0))])
    np.testing.assert_allclose(view.points, points, rtol=1e-12)
    np.testing.assert_allclose(view.confidence, 3.0 - 0.999, rtol=1e-12)
    assert view.focal_px == pytest.approx(FOCAL, rel=1e-9)
    row, column = np.mgrid[0:HEIGHT, 0:WIDTH]
    anchors = view.anchors(np.stack([column.ravel(), row.ravel()], axis=1))
    depth = view.anchor_depth.ravel()[anchors.index] * anchors.offset
    np.testing.assert_allclose(depth, points[..., 2].ravel(), rtol=1e-9)
    # 36 and 52 are no multiples of 8: the last cells are cut off.
    assert view.cells == view.anchor_depth.shape == (5, 7)
    assert anchors.index.max() == 34


def test_the_mean_of_many_is_better_than_one() -> None:
    truth = _pointmap(np.random.default_rng(0))[..., 2]
    errors = [np.abs(_mean(_noisy(count, 0.0)).points[..., 2] / truth - 1).mean() for count in (1, 16)]
    assert 0.01 < errors[0] < 0.03
    assert errors[1] < 0.45 * errors[0]


def test_pairs_of_different_scale_do_not_tear_the_surface() -> None:
    truth = _pointmap(np.random.default_rng(0))[..., 2]
    spread = {}
    for align_scales in (True, False):
        ratio = _mean(_noisy(8, 0.5), align_scales=align_scales).points[..., 2] / truth
        spread[align_scales] = ratio.std() / ratio.mean()
    assert spread[True] < 0.015
    assert spread[False] > 0.05


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(5)))
def test_the_order_of_the_pairs_does_not_matter(order: list[int]) -> None:
    maps = _noisy(5, 0.0)
    first = _mean(maps, align_scales=False)
    second = _mean([maps[number] for number in order], align_scales=False)
    np.testing.assert_allclose(first.points, second.points, rtol=1e-12)
    np.testing.assert_allclose(first.relative_depth, second.relative_depth, rtol=1e-12)


def test_memory_does_not_grow_with_the_pairs() -> None:
    sums = CanonicalSums((HEIGHT, WIDTH))
    sizes = []
    for points, confidence in _noisy(3, 0.0):
        sums.add(points, confidence)
        sizes.append(sum(value.nbytes for value in vars(sums).values() if isinstance(value, np.ndarray)))
    assert sizes[0] == sizes[2] <= 8 * 8 * HEIGHT * WIDTH


def test_depth_follows_the_angle_of_the_surface() -> None:
    # Twice the focal length: the same pixels are half as far apart on the surface, and so are their depths.
    np.testing.assert_allclose(depth_at_focal(np.array([1.0, 1.2, 0.9]), np.array(0.5)), [1.0, 1.1, 0.95])


@given(st.floats(0.3, 6.0))
@settings(max_examples=20, deadline=None)
def test_focal_lengths_stay_within_their_limits(times: float) -> None:
    points = _pointmap(np.random.default_rng(0))
    points[..., :2] /= times  # the focal length, too, is `times` as long
    usual = WIDTH / (2 * np.tan(np.radians(30)))
    assert focal_of_pointmap(points, CENTRE, limited=False) == pytest.approx(times * FOCAL, rel=1e-6)
    expected = np.clip(times * FOCAL, 0.5 * usual, 3.5 * usual)
    assert focal_of_pointmap(points, CENTRE) == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_averaged_is_refused() -> None:
    points, confidence = _pointmap(np.random.default_rng(0)), np.ones((HEIGHT, WIDTH))
    sums = CanonicalSums((HEIGHT, WIDTH))
    with pytest.raises(ShapeError, match="at least one pointmap"):
        sums.view(CENTRE)
    with pytest.raises(ShapeError, match="in an image of"):
        sums.add(points[1:], confidence[1:])
    with pytest.raises(ShapeError, match="at least 1"):
        sums.add(points, 0.5 * confidence)
    with pytest.raises(ShapeError, match="behind its camera"):
        sums.add(-points, confidence)
    points[3, 4, 2] = np.nan
    with pytest.raises(ShapeError, match="finite"):
        sums.add(points, confidence)
    good = _mean([(_pointmap(np.random.default_rng(0)), confidence)])
    with pytest.raises(ShapeError, match="outside the image of 52×36 px"):
        good.anchors(np.array([[WIDTH, 0]]))
