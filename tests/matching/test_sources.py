"""Keypoints of several kinds: which are distinct, how sure a match is, and how matches of all kinds are joined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.matching.check import Putative
from mast3r_sfm.matching.putative import KeypointSource, join_putative, match_keypoints, nearest_pixels
from mast3r_sfm.types import Encoding, Float64, PixelTransform
from tests.exact import HEIGHT_PX, WIDTH_PX, Describer, random_pixels, ring


def keypoints(tokens: list[list[float]], scale: float = 1.0) -> Encoding:
    """Unit descriptors at (0.5, 0.5), (1.5, 0.5), … of the network's pixels."""
    array = np.array(tokens, np.float64).reshape(len(tokens), -1)
    array /= np.linalg.norm(array, axis=1, keepdims=True)
    xy = np.stack([np.arange(len(array)) + 0.5, np.full(len(array), 0.5)], axis=1)
    return Encoding(
        tokens=array.astype(np.float16),
        xy=(scale * xy).astype(np.float32),
        attention=np.ones(len(array), np.float32),
        transform=PixelTransform(matrix=np.array([[scale, 0.0, 0.0], [0.0, scale, 0.0]])),
        network_size=(8, 6),
    )


def source(min_similarity: float = 0.0, max_ratio: float = 0.9) -> KeypointSource:
    return KeypointSource(encodings=(), min_similarity=min_similarity, max_ratio=max_ratio)


FIRST = keypoints([[1, 0, 0, 0], [0, 1, 0, 0]])
SECOND = keypoints([[1, 0, 0, 0], [1, 0, 0.1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
"""The first keypoint has a rival, whose descriptor is 0.1 away; the second has none within √2."""


def test_a_match_with_a_rival_is_kept_and_has_no_say() -> None:
    """A rival at hardly more distance than the match: in the first image, and, swapped, in the second."""
    near = keypoints([[1, 0, 0.2, 0], [0, 1, 0, 0]])  # 0.2 from one, 0.1 from the other
    rivals = keypoints([[1, 0, 0.09, 0], [1, 0, 0.32, 0], [0, 1, 0, 0]])
    for views in ((near, rivals), (rivals, near)):
        putative = match_keypoints(views, source(), views)
        assert len(putative.xy_first) == 2
        assert putative.is_distinct.tolist() == [False, True]
        assert putative.confidence[0] < 0 < putative.confidence[1] <= 1


def test_distinct_is_what_lies_below_the_ratio_of_its_source() -> None:
    near = keypoints([[1, 0, 0.1, 0]])
    rivals = keypoints([[1, 0, 0, 0], [1, 0, 0.3, 0]])  # 0.1 and 0.2 away: half as far
    views = near, rivals
    for max_ratio, distinct in ((0.4, False), (0.6, True)):
        putative = match_keypoints(views, source(max_ratio=max_ratio), views)
        assert putative.is_distinct.tolist() == [distinct]


@pytest.mark.parametrize("max_ratio", [0.3, 0.6, 0.8, 1.0])
def test_confidence_means_the_same_for_every_source(max_ratio: float) -> None:
    """1 without any rival, 0 where a match ceases to be distinct."""
    scene = ring(2, turn_deg=40)
    first, second = Describer(scene, strangers=400).encodings()
    putative = match_keypoints((first, second), source(-1.0, max_ratio), (first, second))
    assert putative.confidence.dtype == np.float32
    np.testing.assert_array_equal(putative.is_distinct, putative.confidence > 0)
    assert 0.4 < putative.confidence.max() <= 1
    alone = match_keypoints((FIRST, FIRST), source(max_ratio=max_ratio), (FIRST, FIRST))
    assert alone.confidence.min() > 0.99


def test_matches_are_given_in_the_pixels_of_the_model() -> None:
    """SIFT may have seen the photo at another size than the model."""
    own = keypoints([[1, 0, 0, 0]], scale=5.0)
    putative = match_keypoints((FIRST, SECOND), source(), (own, keypoints([[1, 0, 0, 0]], scale=2.0)))
    np.testing.assert_allclose(putative.xy_first, [[0.1, 0.1], [0.3, 0.1]])
    np.testing.assert_allclose(putative.xy_second, [[0.25, 0.25], [1.25, 0.25]])
    assert putative.frames is not None
    np.testing.assert_allclose(putative.frames[0], [[0, 0], [8, 6]])


def some(xy: Float64, confidence: float, *, distinct: bool = True) -> Putative:
    count = len(xy)
    return Putative(
        xy_first=xy,
        xy_second=xy + 1,
        confidence=np.full(count, confidence, np.float32),
        is_distinct=np.full(count, distinct, np.bool_),
        frames=(np.zeros((2, 2)), np.ones((2, 2))),
    )


def test_joined_matches_stand_once_and_the_earliest_wins() -> None:
    xy = random_pixels(np.random.default_rng(0), 30)
    joined = join_putative([some(xy[10:20], 0.5), some(xy[:15], 0.9, distinct=False), some(xy[5:], 0.1)])
    np.testing.assert_array_equal(joined.xy_first, np.concatenate([xy[10:20], xy[:10], xy[20:]]))
    np.testing.assert_array_equal(joined.xy_second, joined.xy_first + 1)
    np.testing.assert_allclose(joined.confidence, [0.5] * 10 + [0.9] * 10 + [0.1] * 10)
    np.testing.assert_array_equal(joined.is_distinct, [True] * 10 + [False] * 10 + [True] * 10)
    assert joined.frames is not None
    assert joined.points is None


def test_matches_that_share_one_pixel_only_are_all_kept() -> None:
    xy = random_pixels(np.random.default_rng(0), 3)
    other = replace(some(xy, 0.5), xy_second=xy + 2)
    assert len(join_putative([some(xy, 0.5), other]).xy_first) == 6


def test_one_part_is_joined_to_itself() -> None:
    part = some(random_pixels(np.random.default_rng(0), 20), 0.5)
    joined = join_putative([part])
    np.testing.assert_array_equal(joined.xy_first, part.xy_first)
    assert len(join_putative([some(np.zeros((0, 2)), 0.5)] * 2).xy_first) == 0


def test_nothing_is_lost_by_a_second_source() -> None:
    scene = ring(2, turn_deg=40)
    first, second = Describer(scene, strangers=100).encodings()
    config = MatchConfig()
    one = match_keypoints((first, second), source(config.min_similarity), (first, second))
    joined = join_putative([some(random_pixels(np.random.default_rng(1), 50), 0.3), one])
    assert len(joined.xy_first) == 50 + len(one.xy_first)
    np.testing.assert_array_equal(joined.xy_first[50:], one.xy_first)
    np.testing.assert_array_equal(joined.is_distinct[50:], one.is_distinct)


# Upright crops of 6 × 4 pixels, four photo pixels each, that begin two network pixels from the photo's corner.
UPRIGHT = np.array([[4.0, 0.0, 8.0], [0.0, 4.0, 8.0]])
ON_ITS_SIDE = np.array([[0.0, 4.0, 8.0], [-4.0, 0.0, 40.0]])


@pytest.mark.parametrize("matrix", [UPRIGHT, ON_ITS_SIDE])
def test_the_nearest_pixel_is_the_one_that_shows_the_place(matrix: Float64) -> None:
    transform = PixelTransform(matrix=matrix)
    encoding = replace(FIRST, transform=transform, network_size=(6, 4))
    rows, columns = np.divmod(np.arange(24), 6)
    middles = np.stack([columns, rows], axis=1) + 0.5
    for offset in (-0.49, 0.0, 0.49):
        index = nearest_pixels(transform.to_photo(middles + offset), encoding)
        np.testing.assert_array_equal(index, np.arange(24))
        assert index.dtype == np.int64


def test_places_outside_of_a_crop_have_the_pixel_at_its_border() -> None:
    encoding = replace(FIRST, transform=PixelTransform(matrix=UPRIGHT), network_size=(6, 4))
    outside = np.array([[0.0, 0.0], [1000.0, 0.0], [0.0, 1000.0], [1000.0, 1000.0], [18.0, -5.0]])
    np.testing.assert_array_equal(nearest_pixels(outside, encoding), [0, 5, 18, 23, 2])
    # What lies on the last edge of the photo is no pixel of its own.
    whole = replace(FIRST, transform=PixelTransform(matrix=np.eye(2, 3)), network_size=(WIDTH_PX, HEIGHT_PX))
    assert nearest_pixels(np.array([[WIDTH_PX, HEIGHT_PX]], np.float64), whole)[0] == WIDTH_PX * HEIGHT_PX - 1
