"""The choice of windows: photos are covered, windows lie inside, enough is shown; tests/golden has the parity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.matching.windows import (
    COVERAGE,
    MIN_MATCHES,
    Size,
    Tiling,
    greedy,
    grid,
    norm_windows,
    select,
    start_pos,
    window_size,
)
from mast3r_sfm.types import Float64, Int64

SIDES = st.integers(1, 3000)
SEEDS = st.integers(0, 2**32 - 1)


@given(SIDES, SIDES, st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_windows_cover_an_axis_and_overlap(total: int, window: int, overlap: float) -> None:
    starts = start_pos(total, window, overlap)
    assert starts[0] == 0
    if total <= window:
        assert starts.tolist() == [0]
        return
    assert starts[-1] == total - window
    # Starts are rounded to whole pixels.
    assert np.diff(starts).min() >= 0
    assert np.diff(starts).max() <= max(1, (1 - overlap) * window + 1)


@pytest.mark.parametrize(("total", "window", "overlap"), [(0, 5, 0.5), (5, 0, 0.5), (5, 5, 1.0), (5, 5, -0.1)])
def test_impossible_windows(total: int, window: int, overlap: float) -> None:
    with pytest.raises(ShapeError, match="sides >= 1"):
        start_pos(total, window, overlap)


@given(st.integers(16, 900), st.integers(16, 900))
def test_a_grid_shows_every_pixel(width: int, height: int) -> None:
    photo = (width, height)
    windows = grid(photo, window_size(photo, 256))
    assert_inside(windows, photo)
    shown = np.zeros((height, width), bool)
    for left, top, right, bottom in windows.tolist():
        shown[top:bottom, left:right] = True
    assert shown.all()
    if min(windows[0, 2:]) >= 16 and max(photo) >= 256 and max(photo) <= 16 * min(photo):
        assert (windows[:, 2:] - windows[:, :2] == window_size(photo, 256)).all()


def assert_inside(windows: Int64, photo: Size) -> None:
    assert windows.min() >= 0
    assert (windows[:, 2:] <= photo).all()
    assert (windows[:, 2:] > windows[:, :2]).all()


@given(SIDES, SIDES, SEEDS, st.booleans())
def test_windows_are_brought_into_the_photo(width: int, height: int, seed: int, given_shape: bool) -> None:
    photo = (width, height)
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-1.5, 1.5, (20, 2)) * photo
    boxes = np.concatenate([corners, corners + rng.uniform(0, 1.5, (20, 2)) * photo], axis=1)
    shape = (1 + width // 3, 1 + height // 2) if given_shape else None
    windows = norm_windows(boxes, photo, shape)
    assert_inside(windows, photo)
    if shape is not None:
        assert (windows[:, 2:] - windows[:, :2] == shape).all()
        inner = np.all(
            (boxes[:, :2] + boxes[:, 2:] >= shape) & (boxes[:, :2] + boxes[:, 2:] <= 2 * np.array(photo) - shape),
            axis=1,
        )
        offset = (windows[:, :2] + windows[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2
        assert np.abs(offset[inner]).max(initial=0.0) <= 1


def test_a_shape_larger_than_the_photo_is_refused() -> None:
    with pytest.raises(ShapeError, match="400×300 px holds no window of 512×384"):
        norm_windows(np.zeros((1, 4)), (400, 300), (512, 384))


@given(SEEDS, st.integers(1, 12), st.integers(1, 30), st.floats(0.1, 1.0))
def test_greedy_reaches_the_coverage_and_stops(seed: int, pairs: int, matches: int, coverage: float) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.uniform(size=(pairs, matches)) * (rng.uniform(size=(pairs, matches)) < 0.5)
    order = greedy(weights, coverage)
    assert len(set(order.tolist())) == len(order)
    goal = coverage * weights.max(axis=0).sum()
    gains = [weights[order[:count]].max(axis=0, initial=0.0).sum() for count in range(len(order) + 1)]
    assert gains[-1] >= goal * (1 - 1e-12)
    if len(order):
        assert gains[-2] < goal
        assert order[0] == weights.sum(axis=1).argmax()
        assert (np.diff(np.diff(gains)) <= 1e-9).all()  # each adds no more than the one before it


def shifted(count: int, photo: Size, shift: tuple[float, float], seed: int = 0) -> tuple[Float64, Float64]:
    """Matches of a photo and the same, moved."""
    rng = np.random.default_rng(seed)
    first = rng.uniform(0, photo, (count, 2))
    second = first + shift
    seen = ((second >= 0) & (second < photo)).all(axis=1)
    return first[seen], second[seen]


def tiling(photo: Size, size_px: int = 256, *, forced: bool = True) -> Tiling:
    window = window_size(photo, size_px)
    return Tiling(photo=photo, window=window, shape=window if forced else None)


@given(SEEDS, st.integers(0, 600), st.booleans())
def test_chosen_windows_lie_inside_and_show_most_matches(seed: int, count: int, forced: bool) -> None:
    photos: tuple[Size, Size] = (900, 700), (700, 900)
    first, second = shifted(count, (700, 700), (60, -40), seed)
    matches = first, second
    windows = select(matches, (tiling(photos[0], forced=forced), tiling(photos[1], forced=forced)))
    assert len(windows[0]) == len(windows[1])
    if len(windows[0]) == 0:
        assert count < 16 * MIN_MATCHES
        return
    for side in (0, 1):
        assert_inside(windows[side], photos[side])
    shown = np.zeros(len(first), bool)
    for one, other in zip(*windows, strict=True):
        shown |= inside(first, one) & inside(second, other)
    if count > 300:
        assert shown.mean() >= COVERAGE - 0.1
    again = select(matches, (tiling(photos[0], forced=forced), tiling(photos[1], forced=forced)))
    for side in (0, 1):
        np.testing.assert_array_equal(windows[side], again[side])


def inside(xy: Float64, box: Int64) -> np.ndarray:
    result: np.ndarray = ((xy >= box[:2]) & (xy < box[2:])).all(axis=1)
    return result


def test_pairs_of_windows_show_the_same_place() -> None:
    photo = (2000, 1500)
    matches = shifted(3000, photo, (150, 90))
    first, second = select(matches, (tiling(photo), tiling(photo)))
    # Where windows are not pushed back from the border, one is the other, moved.
    free = ((first[:, :2] > 200) & (first[:, 2:] < np.array(photo) - 200)).all(axis=1)
    assert free.sum() > 20
    assert np.abs(np.median(second[free] - first[free], axis=0) - [150, 90, 150, 90]).max() < 6
    sides = second[:, 2:] - second[:, :2]
    assert (sides == (256, 192)).all()


def test_a_small_photo_is_its_own_window() -> None:
    large, small = (2000, 1500), (200, 150)
    first, _ = shifted(2000, large, (0, 0))
    windows = select((first, first / 10), (tiling(large), tiling(small)))
    assert np.unique(windows[1], axis=0).tolist() == [[0, 0, 200, 150]]
    assert len(windows[0]) > 20
    turned = select((first / 10, first), (tiling(small), tiling(large)))
    assert np.unique(turned[0], axis=0).tolist() == [[0, 0, 200, 150]]
    both = select((first / 10, first / 10), (tiling(small), tiling(small)))
    assert both[0].tolist() == both[1].tolist() == [[0, 0, 200, 150]]


def test_large_photos_are_no_matter_of_patience() -> None:
    """48 megapixels: 961 windows each, and thousands of matches."""
    photo = (8000, 6000)
    matches = shifted(6000, photo, (300, -200))
    first, second = select(matches, (tiling(photo, 512), tiling(photo, 512)))
    assert 100 < len(first) < 1000
    for windows in (first, second):
        assert_inside(windows, photo)
