"""Matches before any check, from keypoints and from dense predictions."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.rigid import transform_points
from mast3r_sfm.geometry.similarity import align_similarity
from mast3r_sfm.matching.check import Putative
from mast3r_sfm.matching.putative import match_dense, match_keypoints, shown
from mast3r_sfm.synthetic.oracle import OracleModel, OracleNoise
from mast3r_sfm.synthetic.render import View, make_views
from mast3r_sfm.types import Encoding, Float64, PixelTransform
from tests.exact import HEIGHT_PX, WIDTH_PX, Describer, keypoint_source, ring
from tests.scenes import load, second_from_first


def match(views: tuple[Encoding, Encoding], config: MatchConfig | None = None) -> Putative:
    """A keypoint model's matches."""
    return match_keypoints(views, keypoint_source(config=config), views)


def test_keypoints_that_look_alike_are_matched() -> None:
    scene = ring(2, turn_deg=40)
    first, second = Describer(scene, strangers=200).encodings()
    putative = match((first, second))
    distance = np.abs(putative.xy_first[:, None] - scene.project(0)).sum(axis=2)
    nearest = distance.argmin(axis=1)
    true = (distance.min(axis=1) < 1e-3) & (np.abs(putative.xy_second - scene.project(1)[nearest]) < 1e-3).all(axis=1)
    assert true.sum() > 290
    assert true.mean() > 0.98
    assert (putative.confidence <= 1).all()
    assert putative.is_distinct[true].mean() > 0.98
    assert putative.points is None
    assert putative.subset(true).points is None


def test_keypoints_are_matched_in_network_pixels_of_the_stored_photo() -> None:
    """A phone photo that lies on its side: its camera's pixels stay those of the file."""
    scene = ring(2, turn_deg=40)
    upright = Describer(scene).encodings()
    photo = Describer(scene, photo_scale=4.0).encodings()
    turned = [
        replace(encoding, transform=PixelTransform(matrix=np.array([[0.0, 4.0, 0.0], [-4.0, 0.0, 4.0 * HEIGHT_PX]])))
        for encoding in photo
    ]
    plain, large = match((upright[0], upright[1])), match((turned[0], turned[1]))
    np.testing.assert_allclose(large.xy_first, plain.xy_first, atol=1e-3)
    np.testing.assert_allclose(large.xy_second, plain.xy_second, atol=1e-3)
    assert large.xy_first[:, 0].max() > HEIGHT_PX


def test_dissimilar_keypoints_are_no_match() -> None:
    one, other = Describer(ring(1), seed=0).encodings()[0], Describer(ring(1), seed=1).encodings()[0]
    assert len(match((one, other)).xy_first) == 0
    assert len(match((one, other), MatchConfig(min_similarity=-1)).xy_first) > 50


def test_an_image_without_keypoints_matches_nothing() -> None:
    (full,) = Describer(ring(1)).encodings()
    empty = replace(full, tokens=full.tokens[:0], xy=full.xy[:0], attention=full.attention[:0])
    for pair in ((full, empty), (empty, full), (empty, empty)):
        putative = match(pair)
        assert putative.xy_first.shape == putative.xy_second.shape == (0, 2)


@lru_cache
def small_views() -> list[View]:
    """Small, since every pixel of one view is compared with every seed of the other."""
    return list(make_views("facade", 3, width_px=80, height_px=64).values())


def oracle(**noise: float) -> tuple[OracleModel, list[Encoding]]:
    """A model and its encodings of the views."""
    views = {f"{number}.jpg": view for number, view in enumerate(small_views())}
    model = OracleModel(views, OracleNoise(**noise))
    return model, model.encode(load(views))


def world(view: View, xy: Float64) -> Float64:
    """Surface points [M, 3] at pixel centres [M, 2]."""
    columns, rows = (xy - 0.5).round().astype(int).T
    np.testing.assert_allclose(np.stack([columns, rows], axis=1) + 0.5, xy)
    return view.points_world[rows, columns]


def decode_and_match(model: OracleModel, first: Encoding, second: Encoding) -> Putative:
    ((_, forward, backward),) = model.predict([(first, second)])
    return match_dense((forward, backward), first, second)


@pytest.fixture(scope="module")
def dense() -> tuple[View, View, Putative]:
    """Two views of the façade, with pairs of scales of their own but otherwise exact."""
    first, second, _ = small_views()
    model, encodings = oracle(log_scale=0.7)
    return first, second, decode_and_match(model, encodings[0], encodings[1])


def test_dense_matches_are_true(dense: tuple[View, View, Putative]) -> None:
    first, second, putative = dense
    assert len(putative.xy_first) > 1000
    error = np.linalg.norm(world(first, putative.xy_first) - world(second, putative.xy_second), axis=1)
    footprint = first.depth.mean() / first.K[0, 0]  # what a pixel covers
    assert np.median(error) < footprint
    assert (error < 3 * footprint).mean() > 0.95


def test_dense_matches_are_unique_and_confident(dense: tuple[View, View, Putative]) -> None:
    putative = dense[2]
    both = np.concatenate([putative.xy_first, putative.xy_second], axis=1)
    assert len(np.unique(both, axis=0)) == len(both)
    assert (putative.confidence > 0).all()
    assert np.median(putative.confidence) == pytest.approx(10)  # most matches lie where both views see the surface


def test_dense_matches_bring_points_of_one_scale(dense: tuple[View, View, Putative]) -> None:
    first, second, putative = dense
    assert putative.points is not None
    points = putative.points(np.arange(len(putative.xy_first)))
    points_first, points_second = points.first, points.second
    truth = transform_points(first.cam_from_world, world(first, putative.xy_first))
    similarity = align_similarity(points_first, truth)
    assert abs(np.log(similarity.scale)) > 0.05  # the pair's own scale
    np.testing.assert_allclose(similarity.apply(points_first), truth, atol=1e-4)
    np.testing.assert_allclose(similarity.rotation, np.eye(3), atol=1e-5)
    # The second view's points are in its own frame, and in the scale of the first order.
    own = transform_points(second.cam_from_world, world(second, putative.xy_second))
    np.testing.assert_allclose(similarity.scale * points_second, own, rtol=0.01)
    moved = transform_points(second_from_first(first, second), similarity.scale * points_first)
    assert np.median(np.linalg.norm(moved - own, axis=1)) < 2 * first.depth.mean() / first.K[0, 0]


def test_points_are_those_of_the_matches_asked_for(dense: tuple[View, View, Putative]) -> None:
    """Also of matches that were picked out, and picked out of those again."""
    putative = dense[2]
    assert putative.points is not None
    whole = putative.points(np.arange(len(putative.xy_first)))
    order = np.random.default_rng(0).permutation(len(putative.xy_first))[:200]
    mask = np.arange(200) % 3 == 1
    picked = putative.subset(order).subset(mask)
    numbers = np.arange(len(picked.xy_first))[::-1]
    expected = order[mask][numbers]
    np.testing.assert_array_equal(picked.xy_first[numbers], putative.xy_first[expected])
    assert picked.points is not None
    found = picked.points(numbers)
    np.testing.assert_allclose(found.first, whole.first[expected], rtol=1e-6)
    # The scale of the second view is fitted to the matches that are asked for.
    np.testing.assert_allclose(found.second, whole.second[expected], rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_points_of_too_few_matches_keep_their_scale(dense: tuple[View, View, Putative], count: int) -> None:
    """No scale can be fitted to them, and no geometry will be believed on them."""
    putative = dense[2]
    assert putative.points is not None
    points = putative.points(np.arange(count))
    assert points.first.shape == points.second.shape == (count, 3)
    assert np.isfinite(points.second).all()
    assert points.decode_disagreement_deg == 0


def test_a_larger_photo_changes_no_dense_match() -> None:
    model, (first, second, _) = oracle()
    transform = PixelTransform(matrix=np.array([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    large = [replace(encoding, transform=transform) for encoding in (first, second)]
    plain, scaled = decode_and_match(model, first, second), decode_and_match(model, *large)
    np.testing.assert_allclose(scaled.xy_first, plain.xy_first)
    np.testing.assert_allclose(scaled.xy_second, plain.xy_second)
    assert 70 < plain.xy_first[:, 0].max() < 80


def test_frames_are_what_the_network_saw() -> None:
    """In the pixels of the stored photo, at the network's scale."""
    scene = ring(1)
    encoding = Describer(scene, photo_scale=4.0).encodings()[0]
    np.testing.assert_allclose(shown(encoding), [[0, 0], [WIDTH_PX, HEIGHT_PX]])
    # A photo that lies on its side, and of which a crop was seen.
    matrix = np.array([[0.0, 4.0, 40.0], [-4.0, 0.0, 4.0 * WIDTH_PX + 20.0]])
    lying = replace(encoding, transform=PixelTransform(matrix=matrix))
    np.testing.assert_allclose(shown(lying), [[10, 5], [HEIGHT_PX + 10, WIDTH_PX + 5]])
    putative = match((encoding, encoding))
    assert putative.frames is not None
    np.testing.assert_array_equal(putative.frames[1], shown(encoding))
    subset = putative.subset(np.arange(3)).frames
    assert subset is not None
    np.testing.assert_array_equal(subset[0], shown(encoding))
