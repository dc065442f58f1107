from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.summaries import ModelSummary, RunReport
from mast3r_sfm.types import (
    AlignmentResult,
    Encoding,
    ImageRecord,
    ImageSet,
    LoadedImage,
    PairMatches,
    PairPrediction,
    PixelTransform,
    Reason,
    Rig,
    Tracks,
    Verdict,
    ViewGraph,
    ViewPrediction,
)

IDENTITY = np.eye(2, 3)


def record(name: str = "a.jpg", **values: Any) -> ImageRecord:
    return ImageRecord(**{"name": name, "width_px": 640, "height_px": 480, "sha256": "0" * 64} | values)


def matches(count: int = 5, verdict: Verdict = Verdict.GOOD, **values: Any) -> PairMatches:
    depth = count if verdict.has_depth else 0
    good = {
        "first": 0,
        "second": 3,
        "xy_first": np.ones((count, 2)),
        "xy_second": np.ones((count, 2)),
        "confidence": np.ones(count, np.float32),
        "points_first": np.ones((depth, 3)),
        "points_second": np.ones((depth, 3)),
        "verdict": verdict,
        "inlier_ratio": 0.5,
    }
    return PairMatches(**good | values)


def encoding(count: int = 4, **values: Any) -> Encoding:
    good = {
        "tokens": np.ones((count, 64), np.float16),
        "xy": np.ones((count, 2), np.float32),
        "attention": np.ones(count, np.float32),
        "transform": PixelTransform(matrix=IDENTITY),
        "network_size": (640, 480),
    }
    return Encoding(**good | values)


def graph(pairs: object, num_images: int = 5) -> ViewGraph:
    array = np.array(pairs, np.int32).reshape(-1, 2)
    count = len(array)
    return ViewGraph(
        num_images=num_images,
        pairs=array,
        score=np.ones(count, np.float32),
        reason=np.full(count, Reason.NEAREST, np.int32),
    )


@pytest.mark.parametrize("name", ["a.jpg", "sub/ä b.jpg", "..hidden.jpg", "a/.../b.jpg"])
def test_relative_names_are_taken(name: str) -> None:
    assert record(name).name == name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "relative POSIX path"),
        ({"name": "/a.jpg"}, r"'/a\.jpg' must be a relative POSIX path"),
        ({"name": "../a.jpg"}, "inside the image root"),
        ({"name": "sub/../../a.jpg"}, "inside the image root"),
        ({"width_px": 0}, r"a\.jpg: size 0×480 px must be positive"),
        ({"height_px": -1}, "must be positive"),
        ({"orientation": 0}, "orientation 0 must be 1–8"),
        ({"orientation": 9}, "orientation 9 must be 1–8"),
    ],
)
def test_a_wrong_record_says_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        record(**values)


def test_image_set_keeps_names_in_order() -> None:
    images = ImageSet(root=Path(), records=(record("a.jpg"), record("b/a.jpg"), record("c.jpg")))
    assert images.names == ("a.jpg", "b/a.jpg", "c.jpg")
    assert len(images) == 3


@pytest.mark.parametrize("names", [("b.jpg", "a.jpg"), ("a.jpg", "a.jpg")])
def test_image_set_must_be_sorted_and_unique(names: tuple[str, ...]) -> None:
    with pytest.raises(ShapeError, match="sorted by name, without duplicates"):
        ImageSet(root=Path(), records=tuple(record(name) for name in names))


COORDINATES = st.floats(-1e4, 1e4)


@given(
    matrix=hnp.arrays(np.float64, (2, 3), elements=st.floats(-100, 100)),
    xy=hnp.arrays(np.float64, st.tuples(st.integers(0, 20), st.just(2)), elements=COORDINATES),
)
def test_pixel_transform_round_trip(matrix: Any, xy: Any) -> None:
    assume(np.linalg.cond(matrix[:, :2]) < 1e3)
    assume(abs(np.linalg.det(matrix[:, :2])) > 1e-3)
    transform = PixelTransform(matrix=matrix)
    np.testing.assert_allclose(transform.to_network(transform.to_photo(xy)), xy, atol=1e-5)
    np.testing.assert_allclose(transform.to_photo(transform.to_network(xy)), xy, atol=1e-5)


@given(scale=st.floats(0.01, 100), quarter_turns=st.integers(0, 3))
def test_scale_of_a_turned_resize(scale: float, quarter_turns: int) -> None:
    turn = np.linalg.matrix_power(np.array([[0.0, -1.0], [1.0, 0.0]]), quarter_turns)
    transform = PixelTransform(matrix=np.column_stack([scale * turn, [3.0, 4.0]]))
    assert transform.scale == pytest.approx(scale, rel=1e-12)


def test_a_pure_resize_maps_corners_to_corners() -> None:
    transform = PixelTransform(matrix=np.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    np.testing.assert_array_equal(transform.to_photo(np.array([[0.5, 0.5], [320.0, 240.0]])), [[1, 1], [640, 480]])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(3), r"shape \(3, 3\), expected \[2, 3\]"),
        (np.zeros((2, 3)), "not invertible"),
        (np.full((2, 3), np.nan), "NaN or infinite"),
    ],
)
def test_a_wrong_pixel_transform(matrix: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        PixelTransform(matrix=matrix)


@pytest.mark.parametrize("shape", [(480, 640), (480, 640, 4), (3,)])
def test_loaded_pixels_must_be_rgb(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"a\.jpg: pixels has shape"):
        LoadedImage(record=record(), pixels=np.zeros(shape, np.uint8), transform=PixelTransform(matrix=IDENTITY))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_an_encoding_of_any_size_is_taken(count: int) -> None:
    assert encoding(count).tokens.shape == (count, 64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": np.ones((3, 64), np.float16)}, r"Encoding\.xy has shape \(4, 2\), expected \[3, 2\]"),
        ({"tokens": np.ones(4, np.float16)}, r"Encoding\.tokens .* expected \[4, \*\]"),
        ({"tokens": np.full((4, 64), np.inf, np.float16)}, r"Encoding\.tokens holds NaN"),
        ({"attention": np.ones(5, np.float32)}, r"Encoding\.attention"),
    ],
)
def test_a_wrong_encoding(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        encoding(**values)


@pytest.mark.parametrize(
    ("descriptors", "confidence"),
    [((6, 8, 24), (5, 8)), ((6, 8, 24), (6, 8, 1)), ((6, 8), (6, 8)), ((2, 6, 8, 24), (2, 6, 8)), ((5, 8, 24), (6, 8))],
)
def test_maps_of_a_prediction_must_agree(descriptors: tuple[int, ...], confidence: tuple[int, ...]) -> None:
    def points_at(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(len(index), 3), torch.ones(len(index))

    # Views of two shapes are all right.
    views = [
        ViewPrediction(descriptors=torch.ones(*size, 24), descriptor_confidence=torch.ones(*size), points_at=points_at)
        for size in ((6, 8), (8, 6))
    ]
    assert not PairPrediction(first=views[0], second=views[1]).euclidean
    with pytest.raises(ShapeError, match=r"ViewPrediction: descriptors \(.*\) must be \[H, W, D\] and \[H, W\]"):
        ViewPrediction(
            descriptors=torch.ones(descriptors), descriptor_confidence=torch.ones(confidence), points_at=points_at
        )


@given(pairs=st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda pair: pair[0] < pair[1])))
def test_every_sorted_set_of_pairs_is_a_graph(pairs: set[tuple[int, int]]) -> None:
    assert graph(sorted(pairs), num_images=10).pairs.tolist() == [list(pair) for pair in sorted(pairs)]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(1, 1)], "i < j"),
        ([(2, 1)], "i < j"),
        ([(1, 2), (0, 1)], "sorted"),
        ([(0, 1), (0, 1)], "unique"),
        ([(0, 5)], r"outside 0\.\.4"),
        ([(-1, 2)], r"outside 0\.\.4"),
    ],
)
def test_a_wrong_graph(pairs: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        graph(pairs)


def test_a_graph_has_one_score_and_reason_per_pair() -> None:
    with pytest.raises(ShapeError, match=r"ViewGraph\.score"):
        dataclasses.replace(graph([(0, 1)]), score=np.ones(2, np.float32))
    with pytest.raises(ShapeError, match=r"ViewGraph\.reason"):
        dataclasses.replace(graph([(0, 1)]), reason=np.ones(2, np.int32))


def test_stored_reasons_do_not_change() -> None:
    assert {reason.name: reason.value for reason in Reason} == {
        "KEYFRAME": 0,
        "NEAREST": 1,
        "NEIGHBOUR": 2,
        "BRIDGE": 3,
        "USER": 4,
        "EXHAUSTIVE": 5,
        "SEQUENCE": 6,
        "GPS": 7,
        "SECOND_ROUND": 8,
    }


@pytest.mark.parametrize(
    ("verdict", "is_link", "has_depth"),
    [
        (Verdict.GOOD, True, True),
        (Verdict.PLANAR, True, True),
        (Verdict.PURE_ROTATION, True, False),
        (Verdict.WEAK, False, False),
        (Verdict.TOO_FEW, False, False),
        (Verdict.WATERMARK, False, False),
    ],
)
def test_what_a_verdict_means(verdict: Verdict, is_link: bool, has_depth: bool) -> None:
    assert (verdict.is_link, verdict.has_depth) == (is_link, has_depth)
    assert Verdict(str(verdict)) is verdict
    assert len(matches(6, verdict)) == 6


def test_points_without_depth_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"points_first has shape \(5, 3\), expected \[0, 3\]"):
        matches(verdict=Verdict.PURE_ROTATION, points_first=np.ones((5, 3)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"first": 3, "second": 3}, r"0 <= first < second, not \(3, 3\)"),
        ({"first": -1}, "0 <= first < second"),
        ({"xy_second": np.ones((4, 2))}, r"xy_second has shape \(4, 2\), expected \[5, 2\]"),
        ({"confidence": np.ones((5, 1), np.float32)}, "confidence"),
        ({"points_second": np.full((5, 3), np.nan)}, "points_second holds NaN"),
        ({"second_from_first": np.eye(4)}, "second_from_first"),
        ({"decode_disagreement_deg": float("nan")}, r"decode_disagreement_deg = nan: must be in \[0, 180\]"),
        ({"decode_disagreement_deg": 181.0}, "decode_disagreement_deg"),
    ],
)
def test_wrong_matches(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        matches(**values)


def test_two_pairs_do_not_share_their_default_pose() -> None:
    one, two = matches(), matches()
    assert one.second_from_first is not two.second_from_first
    np.testing.assert_array_equal(one.second_from_first, np.eye(3, 4))


def test_a_rig_names_only_cameras_it_has() -> None:
    with pytest.raises(ShapeError, match="camera that does not exist"):
        Rig(cameras=(), camera_of_image=np.zeros(1, np.int32))
    assert Rig(cameras=(), camera_of_image=np.zeros(0, np.int32)).cameras == ()


@pytest.mark.parametrize("field", ["images", "cam_from_world", "residual_deg"])
def test_alignment_result_has_one_pose_per_image(field: str) -> None:
    good: dict[str, Any] = {
        "images": np.arange(3, dtype=np.int32),
        "edges": np.arange(2, dtype=np.int32),
        "cam_from_world": np.stack([np.eye(3, 4)] * 3),
        "residual_deg": np.zeros(3),
        "history": (1.0, 0.5),
        "stop_reason": "converged",
    }
    assert len(AlignmentResult(**good).cam_from_world) == 3
    with pytest.raises(ShapeError, match="AlignmentResult"):
        AlignmentResult(**good | {field: good[field][:2]})


def tracks(count: int = 6, **values: Any) -> Tracks:
    good = {
        "points": np.ones((3, 3)),
        "point": np.arange(count) % 3,
        "image": np.arange(count) // 3,
        "keypoint": np.arange(count),
        "xy": np.ones((count, 2)),
    }
    return Tracks(**good | values)


@pytest.mark.parametrize("count", [0, 6])
def test_tracks_of_any_number_of_observations_are_taken(count: int) -> None:
    assert len(tracks(count).xy) == count


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"points": np.ones((3, 2))}, r"Tracks\.points has shape \(3, 2\), expected \[\*, 3\]"),
        ({"points": np.full((3, 3), np.nan)}, r"Tracks\.points holds NaN"),
        ({"image": np.zeros(5, np.int64)}, r"Tracks\.image has shape \(5,\), expected \[6\]"),
        ({"keypoint": np.zeros((6, 1), np.int64)}, r"Tracks\.keypoint"),
        ({"point": np.zeros(5, np.int64)}, r"Tracks\."),
        ({"xy": np.ones((6, 3))}, r"Tracks\.xy has shape \(6, 3\), expected \[6, 2\]"),
        ({"xy": np.full((6, 2), np.inf)}, r"Tracks\.xy holds NaN or infinite"),
    ],
)
def test_wrong_tracks(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        tracks(**values)


def test_a_photo_in_two_models_counts_once() -> None:
    def model(*names: str) -> ModelSummary:
        return ModelSummary(
            path="sparse/0",
            images=names,
            points=1,
            observations=2,
            mean_track_length=2.0,
            mean_reprojection_error_px=0.5,
        )

    report = RunReport(
        version="0",
        versions={},
        model="xfeat",
        model_fingerprint="",
        config={},
        stages=(),
        models=(model("a", "b"), model("b", "c")),
        num_images=4,
        left_out=(),
        rejected_pairs=(),
        notes=(),
        seconds=1.0,
    )
    assert report.num_registered == 3
