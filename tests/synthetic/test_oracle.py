"""The oracle: exact without noise, and wrong exactly as told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pytest
import torch

from mast3r_sfm.errors import ConfigError, InputError
from mast3r_sfm.geometry.rigid import angle_between_rotations, transform_points
from mast3r_sfm.models.base import DenseModel
from mast3r_sfm.synthetic.covisibility import correspond
from mast3r_sfm.synthetic.oracle import OracleModel, OracleNoise
from mast3r_sfm.synthetic.render import make_views
from mast3r_sfm.synthetic.scenes import make_scene
from mast3r_sfm.types import Encoding, Float64, LoadedImage, PairPrediction, PixelTransform, Preparation
from tests.scenes import (
    HEIGHT_PX,
    WIDTH_PX,
    facade_views,
    load,
    object_views,
    oracle,
    record,
    room_views,
    scene_views,
    second_from_first,
)


@dataclass(frozen=True, kw_only=True)
class Maps:
    """A prediction at every pixel of both views."""

    points_in_first: torch.Tensor
    """[2, H, W, 3]."""
    confidence: torch.Tensor
    """[2, H, W] of the points."""
    descriptors: torch.Tensor
    descriptor_confidence: torch.Tensor


def maps(prediction: PairPrediction) -> Maps:
    assert not prediction.euclidean
    views = (prediction.first, prediction.second)
    shape = views[0].descriptors.shape[:2]
    points = [view.points_at(torch.arange(shape.numel())) for view in views]
    return Maps(
        points_in_first=torch.stack([xyz.reshape(*shape, 3) for xyz, _ in points]),
        confidence=torch.stack([confidence.reshape(shape) for _, confidence in points]),
        descriptors=torch.stack([view.descriptors for view in views]),
        descriptor_confidence=torch.stack([view.descriptor_confidence for view in views]),
    )


def decode(model: OracleModel, first: Encoding, second: Encoding) -> Maps:
    """The pair in its first order."""
    ((number, forward, _),) = model.predict([(first, second)])
    assert number == 0
    return maps(forward)


def predict(model: OracleModel, first: int, second: int, views=None) -> Maps:
    encodings = model.encode(load(views or facade_views()))
    return decode(model, encodings[first], encodings[second])


def true_points(views, first: int, second: int) -> Float64:
    a, b = (list(views.values())[index] for index in (first, second))
    return np.stack([transform_points(a.cam_from_world, view.points_world) for view in (a, b)])


def mutual_matches(prediction: Maps) -> tuple[Float64, Float64]:
    """[M, 2] integer pixels (x, y) of both views whose descriptors are each other's nearest."""
    first, second = prediction.descriptors.reshape(2, -1, prediction.descriptors.shape[-1])
    similarity = first @ second.T
    there, back = similarity.argmax(dim=1), similarity.argmax(dim=0)
    here = torch.arange(len(there))
    here = here[back[there] == here]
    width = prediction.descriptors.shape[2]
    return tuple(np.stack([index % width, index // width], axis=-1) for index in (here.numpy(), there[here].numpy()))


def test_it_is_a_dense_model() -> None:
    model = oracle(facade_views())
    assert isinstance(model, DenseModel)
    assert model.retrieval_tokens == (WIDTH_PX // 16) * (HEIGHT_PX // 16)
    assert model.preparation == Preparation(size_px=WIDTH_PX)


def test_maps_have_the_promised_shapes_and_ranges() -> None:
    prediction = predict(oracle(facade_views(), pixel_px=0.5, depth_relative=0.02, log_scale=0.3), 0, 2)
    assert prediction.points_in_first.shape == (2, HEIGHT_PX, WIDTH_PX, 3)
    for values in (prediction.points_in_first, prediction.confidence, prediction.descriptors):
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()
    torch.testing.assert_close(prediction.descriptors.norm(dim=-1), torch.ones(2, HEIGHT_PX, WIDTH_PX))
    assert prediction.confidence.min() >= 1
    assert prediction.descriptor_confidence.min() > 0


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (0, 5), (2, 2)])
def test_without_noise_the_pointmaps_are_the_truth(pair: tuple[int, int]) -> None:
    prediction = predict(oracle(facade_views()), *pair)
    np.testing.assert_allclose(prediction.points_in_first, true_points(facade_views(), *pair), rtol=1e-5, atol=1e-5)


def test_pairs_come_with_their_numbers_and_in_both_orders() -> None:
    model = oracle(facade_views(), log_scale=0.3)
    encodings = model.encode(load(facade_views()))
    found = list(model.predict([(encodings[0], encodings[1]), (encodings[4], encodings[2])]))
    assert [number for number, _, _ in found] == [0, 1]
    for (first, second), (_, forward, backward) in zip(((0, 1), (4, 2)), found, strict=True):
        for one, other, orders in ((first, second, forward), (second, first, backward)):
            expected = decode(model, encodings[one], encodings[other])
            torch.testing.assert_close(maps(orders).points_in_first, expected.points_in_first, rtol=0, atol=0)
            torch.testing.assert_close(maps(orders).descriptors, expected.descriptors, rtol=0, atol=0)
    assert list(model.predict([])) == []
    assert model.images_at_once == model.pairs_at_once == 1


def test_points_are_given_where_they_are_asked_for() -> None:
    model = oracle(facade_views())
    encodings = model.encode(load(facade_views()))
    ((_, forward, _),) = model.predict([(encodings[0], encodings[1])])
    index = torch.tensor([WIDTH_PX * HEIGHT_PX - 1, 5, 5, WIDTH_PX])
    points, confidence = forward.second.points_at(index)
    whole = maps(forward)
    torch.testing.assert_close(points, whole.points_in_first[1].flatten(0, 1)[index], rtol=0, atol=0)
    torch.testing.assert_close(confidence, whole.confidence[1].flatten()[index], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["facade", "room", "object"])
def test_without_noise_mutual_nearest_descriptors_are_true_matches(kind) -> None:
    views = scene_views(kind, 6)
    first, second = list(views.values())[:2]
    here, there = mutual_matches(predict(oracle(views), 0, 1, views))
    xy, seen = correspond(first, second)
    error = np.linalg.norm(there + 0.5 - xy[here[:, 1], here[:, 0]], axis=-1)
    assert len(here) > 0.3 * seen.sum()
    assert (error < 1.5).mean() > 0.97
    assert 0.1 < np.median(error) < 0.6


def test_pixel_noise_moves_matches_by_about_its_size() -> None:
    first, second = list(facade_views().values())[:2]
    xy, _ = correspond(first, second)
    errors = []
    for noise in (0.0, 1.0):
        here, there = mutual_matches(predict(oracle(facade_views(), pixel_px=noise), 0, 1))
        errors.append(float(np.median(np.linalg.norm(there + 0.5 - xy[here[:, 1], here[:, 0]], axis=-1))))
    assert errors[0] < 0.6
    assert 0.8 < errors[1] < 2.5


def test_confidence_tells_what_the_other_view_sees() -> None:
    first, second = list(room_views().values())[:2]
    confidence = predict(oracle(room_views()), 0, 1, room_views()).confidence.numpy()
    for values, (view, other) in zip(confidence, ((first, second), (second, first)), strict=True):
        _, seen = correspond(view, other)
        assert 0.1 < seen.mean() < 0.9
        assert values[seen].min() > 2 * values[~seen].max()


def test_every_ordered_pair_has_a_scale_of_its_own() -> None:
    views = object_views()
    model = oracle(views, log_scale=0.4)
    encodings = model.encode(load(views))
    scales = []
    for first, second in [*combinations(range(9), 2), (1, 0)]:
        truth = true_points(views, first, second)
        found = decode(model, encodings[first], encodings[second]).points_in_first.numpy()
        scale = float((found * truth).sum() / (truth**2).sum())
        np.testing.assert_allclose(found, scale * truth, rtol=1e-4, atol=1e-4)
        scales.append(scale)
    logarithms = np.log(scales)
    assert 0.25 < logarithms.std() < 0.6
    assert abs(logarithms.mean()) < 0.25
    assert len(set(np.round(logarithms, 6))) == len(scales)


def test_depth_noise_is_smooth_and_of_the_size_asked_for() -> None:
    prediction = predict(oracle(facade_views(), depth_relative=0.05), 0, 1)
    truth = true_points(facade_views(), 0, 1)[0]
    error = prediction.points_in_first[0].numpy()[..., 2] / truth[..., 2] - 1
    assert 0.02 < error.std() < 0.1
    assert np.abs(np.diff(error, axis=1)).mean() < 0.1 * error.std()


def test_focal_noise_squeezes_both_pointmaps_alike() -> None:
    prediction = predict(oracle(facade_views(), log_focal=0.2), 0, 1)
    ratio = prediction.points_in_first.numpy() / true_points(facade_views(), 0, 1)
    np.testing.assert_allclose(ratio[..., 2], 1, rtol=1e-4)
    squeeze = np.median(ratio[..., 0])
    assert 0.02 < abs(np.log(squeeze)) < 0.8
    assert np.median(np.abs(ratio[..., :2] - squeeze)) < 1e-4


def fitted_rotation(source: Float64, target: Float64) -> Float64:
    """Rotation [3, 3] that best turns points [K, 3] into others."""
    u, _, v = np.linalg.svd((target - target.mean(axis=0)).T @ (source - source.mean(axis=0)))
    return u @ np.diag([1, 1, np.linalg.det(u @ v)]) @ v


def test_outlier_pairs_are_wrong_consistent_and_as_many_as_asked_for() -> None:
    views = facade_views()
    names, shots = list(views), list(views.values())
    model = oracle(views, seed=3, outlier_pairs=0.4)
    encodings = model.encode(load(views))
    wrong = 0
    for first, second in combinations(range(len(names)), 2):
        outlier = model.is_outlier(names[first], names[second])
        assert outlier == model.is_outlier(names[second], names[first])
        forward = decode(model, encodings[first], encodings[second]).points_in_first[1].numpy().reshape(-1, 3)
        # The second view's own pointmap, as the other order tells it, gives the relative pose that the oracle claims.
        own = decode(model, encodings[second], encodings[first]).points_in_first[0].numpy().reshape(-1, 3)
        claimed = fitted_rotation(own, forward)
        truth = second_from_first(shots[first], shots[second])[:, :3].T
        error = np.degrees(angle_between_rotations(claimed, truth))
        assert error > 3 if outlier else error < 0.01
        residual = forward - forward.mean(axis=0) - (own - own.mean(axis=0)) @ claimed.T
        assert np.abs(residual).max() < 1e-3
        wrong += outlier
    assert 3 <= wrong <= 10


def test_no_outliers_unless_asked_for() -> None:
    model = oracle(facade_views())
    assert not any(model.is_outlier(*pair) for pair in combinations(facade_views(), 2))
    model = oracle(facade_views(), outlier_pairs=1.0)
    assert all(model.is_outlier(*pair) for pair in combinations(facade_views(), 2))
    assert not model.is_outlier("0000.jpg", "0000.jpg")


def test_noise_depends_on_seed_and_names_only() -> None:
    noise = {"pixel_px": 0.5, "depth_relative": 0.02, "log_scale": 0.2, "outlier_pairs": 0.2}
    model = oracle(facade_views(), seed=1, **noise)
    before = predict(model, 0, 3)
    predict(model, 4, 2)
    again = predict(oracle(facade_views(), seed=1, **noise), 0, 3)
    torch.testing.assert_close(predict(model, 0, 3).points_in_first, before.points_in_first, rtol=0, atol=0)
    torch.testing.assert_close(again.points_in_first, before.points_in_first, rtol=0, atol=0)
    torch.testing.assert_close(again.descriptors, before.descriptors, rtol=0, atol=0)
    other = predict(oracle(facade_views(), seed=2, **noise), 0, 3)
    assert (other.points_in_first - before.points_in_first).abs().max() > 1e-3


def test_the_fingerprint_follows_everything_that_changes_the_result() -> None:
    models = [
        oracle(facade_views()),
        oracle(facade_views(), seed=1),
        oracle(facade_views(), pixel_px=0.1),
        oracle(facade_views(4)),
    ]
    assert len({model.fingerprint for model in models}) == 4
    assert oracle(facade_views()).fingerprint == models[0].fingerprint


def best_similarity(first: Encoding, second: Encoding) -> float:
    return float((first.tokens.astype(np.float32) @ second.tokens.astype(np.float32).T).max(axis=1).mean())


def test_tokens_of_views_of_the_same_place_are_alike() -> None:
    encodings = oracle(room_views()).encode(load(room_views()))
    near, far = best_similarity(encodings[0], encodings[1]), best_similarity(encodings[0], encodings[5])
    assert near > 0.75
    assert far < 0.6
    assert [encoding.tokens.shape for encoding in encodings] == [(48, 64)] * 6
    assert all((encoding.attention > 0).all() for encoding in encodings)


def test_larger_photos_get_token_places_in_their_own_pixels() -> None:
    (name, view), *_ = facade_views().items()
    model = oracle(facade_views())
    (small,) = model.encode(load({name: view}))
    five = PixelTransform(matrix=5 * np.eye(2, 3))
    loaded = replace(load({name: view})[0], record=record(name, view, scale=5), transform=five)
    (large,) = model.encode([loaded])
    np.testing.assert_array_equal(large.tokens, small.tokens)
    np.testing.assert_allclose(large.xy, 5 * small.xy)
    np.testing.assert_allclose(small.xy[:2], [[8, 8], [24, 8]])
    np.testing.assert_allclose(large.transform.to_photo(np.array([[WIDTH_PX, HEIGHT_PX]])), [[640, 480]])
    assert large.network_size == (WIDTH_PX, HEIGHT_PX)


def test_an_encoding_is_recognised_after_a_trip_through_memory() -> None:
    model = oracle(facade_views())
    encodings = model.encode(load(facade_views()))
    copies = [
        replace(item, tokens=np.frombuffer(item.tokens.tobytes(), np.float16).reshape(48, 64)) for item in encodings
    ]
    torch.testing.assert_close(
        decode(model, copies[1], copies[4]).descriptors, decode(model, encodings[1], encodings[4]).descriptors
    )


def test_strangers_are_refused() -> None:
    model = oracle(facade_views())
    (stranger,) = oracle(room_views()).encode(load(room_views())[:1])
    with pytest.raises(InputError, match="not made by this oracle"):
        decode(model, stranger, stranger)
    (name, view), *_ = facade_views().items()
    loaded = load({name: view})[0]

    def changed(**values: object) -> LoadedImage:
        return replace(loaded, record=replace(loaded.record, **values))

    with pytest.raises(InputError, match=r"b\.jpg: the oracle knows only"):
        model.encode([changed(name="b.jpg")])
    with pytest.raises(InputError, match="orientation 6"):
        model.encode([changed(orientation=6)])
    with pytest.raises(InputError, match="does not show"):
        model.encode([changed(width_px=WIDTH_PX, height_px=WIDTH_PX)])


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="pixel_px"):
        OracleNoise(pixel_px=-1)
    with pytest.raises(ConfigError, match="outlier_pairs"):
        OracleNoise(outlier_pairs=1.5)
    with pytest.raises(InputError, match="views of one size"):
        OracleModel({})
    mixed = {**facade_views(), **scene_views("facade", 3)}
    two = dict(list(mixed.items())[:2])
    with pytest.raises(InputError, match="at least three views"):
        OracleModel(two, OracleNoise(outlier_pairs=0.5))


BOX = (70, 40, 118, 80)
"""Of a photo twice as large as the view: left, top, right, bottom."""


def windows(names: tuple[str, str], box: tuple[int, int, int, int] = BOX, times: int = 2) -> list[LoadedImage]:
    """A window of each of two photos, `times` as large as the views."""
    left, top, right, bottom = box
    return [
        LoadedImage(
            record=record(name, facade_views()[name], scale=times),
            pixels=np.zeros((bottom - top, right - left, 3), np.uint8),
            transform=PixelTransform(matrix=np.array([[1.0, 0.0, left], [0.0, 1.0, top]])),
        )
        for name in names
    ]


def test_windows_show_what_a_larger_photo_shows_there() -> None:
    names = ("0001.jpg", "0003.jpg")
    large = make_views("facade", 6, width_px=2 * WIDTH_PX, height_px=2 * HEIGHT_PX, samples=1)
    model = OracleModel(facade_views(), scene=make_scene("facade"))
    encodings = model.encode(windows(names))
    left, top, right, bottom = BOX
    for encoding in encodings:
        assert encoding.network_size == (right - left, bottom - top)
        assert encoding.tokens.shape == (3 * 2, 64)
        np.testing.assert_allclose(encoding.xy[0], [left + 8, top + 8])
    prediction = decode(model, *encodings)
    first, second = (large[name].points_world[top:bottom, left:right] for name in names)
    expected = [transform_points(large[names[0]].cam_from_world, points) for points in (first, second)]
    np.testing.assert_allclose(prediction.points_in_first, np.stack(expected), rtol=1e-5, atol=1e-5)
    # The same place has the same descriptor in a window and in a whole photo.
    whole = model.encode(load({name: facade_views()[name] for name in names}))
    mixed = decode_views(model, encodings[0], whole[1])
    similarity = mixed[0].reshape(-1, mixed[0].shape[-1]) @ mixed[1].reshape(-1, mixed[1].shape[-1]).T
    index = similarity.argmax(dim=1).numpy()
    camera = facade_views()[names[1]].camera
    true, _ = camera.project(first.reshape(-1, 3))
    found = np.stack([index % WIDTH_PX, index // WIDTH_PX], axis=1) + 0.5
    assert np.median(np.linalg.norm(found - true, axis=1)) < 0.6


def decode_views(model: OracleModel, first: Encoding, second: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
    """Descriptors of two views of different sizes."""
    ((_, forward, _),) = model.predict([(first, second)])
    return forward.first.descriptors, forward.second.descriptors


def test_noise_of_windows_depends_on_their_place() -> None:
    names = ("0001.jpg", "0003.jpg")
    model = OracleModel(facade_views(), OracleNoise(depth_relative=0.02), scene=make_scene("facade"))
    again = OracleModel(facade_views(), OracleNoise(depth_relative=0.02), scene=make_scene("facade"))
    one = decode(model, *model.encode(windows(names)))
    torch.testing.assert_close(
        decode(again, *again.encode(windows(names))).points_in_first, one.points_in_first, rtol=0, atol=0
    )
    moved = decode(model, *model.encode(windows(names, (71, 40, 119, 80))))
    assert (one.points_in_first[0, :, 1:, 2] - moved.points_in_first[0, :, :-1, 2]).abs().max() > 1e-3
    exact = OracleModel(facade_views(), scene=make_scene("facade"))
    truth = decode(exact, *exact.encode(windows(names)))
    relative = (one.points_in_first[0, ..., 2] / truth.points_in_first[0, ..., 2] - 1).abs()
    assert 0.002 < relative.mean() < 0.06


def test_windows_need_the_scene_and_some_size() -> None:
    with pytest.raises(InputError, match="not the whole photo; give the oracle the scene"):
        oracle(facade_views()).encode(windows(("0001.jpg", "0003.jpg")))
    model = OracleModel(facade_views(), scene=make_scene("facade"))
    with pytest.raises(InputError, match="a window of 48×15 px is too small; give 16 px at least"):
        model.encode(windows(("0001.jpg", "0003.jpg"), (0, 0, 48, 15)))
