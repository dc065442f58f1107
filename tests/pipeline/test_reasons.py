"""What a user is told of photos and pairs that are not in the result."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.alignment.stage import align
from mast3r_sfm.config import AlignConfig
from mast3r_sfm.reasons import describe_turns, rejected_pairs, say_turn, why_left_out, why_nothing
from mast3r_sfm.types import AlignmentResult, ImageRecord, ImageSet, PairMatches, Verdict
from tests.exact import ring, turned_wrong


def pair(first: int, second: int, verdict: Verdict, count: int = 30) -> PairMatches:
    depth = count if verdict.has_depth else 0
    return PairMatches(
        first=first,
        second=second,
        xy_first=np.zeros((count, 2)),
        xy_second=np.zeros((count, 2)),
        confidence=np.ones(count, np.float32),
        points_first=np.ones((depth, 3)),
        points_second=np.ones((depth, 3)),
        verdict=verdict,
        inlier_ratio=0.5,
    )


def photos(number: int) -> ImageSet:
    record = {"width_px": 100, "height_px": 100, "sha256": "0" * 64}
    return ImageSet(root=Path("x"), records=tuple(ImageRecord(name=f"{i}.jpg", **record) for i in range(number)))


@pytest.mark.parametrize(
    ("matches", "expected"),
    [
        ([], "stands in no pair that was matched"),
        ([pair(0, 3, Verdict.WEAK, 0), pair(1, 3, Verdict.TOO_FEW, 0)], "no other photo was found"),
        (
            [pair(0, 3, Verdict.WATERMARK, 0), pair(2, 3, Verdict.WATERMARK, 0), pair(1, 3, Verdict.WEAK, 0)],
            "matches 2 other photos, but only on .* watermark",
        ),
        ([pair(0, 3, Verdict.WATERMARK, 0), pair(3, 4, Verdict.GOOD)], r"matches only 4\.jpg, too little"),
        ([pair(3, 4, Verdict.GOOD)], r"matches only 4\.jpg, too little"),
        ([pair(0, 3, Verdict.PURE_ROTATION), pair(1, 3, Verdict.WEAK, 0)], r"same point as 0\.jpg"),
        (
            [pair(3, 4, Verdict.PURE_ROTATION)],
            r"pure rotation: shows the same place as 4\.jpg, but from the same point",
        ),
        (
            [pair(0, 3, Verdict.GOOD), pair(1, 3, Verdict.PURE_ROTATION)],
            "with 2 photos of the model contradict",
        ),
    ],
)
def test_why_a_photo_is_left_out(matches: list[PairMatches], expected: str) -> None:
    others = [pair(0, 1, Verdict.GOOD), pair(1, 2, Verdict.GOOD)]
    reason = why_left_out(3, [*others, *matches], photos(5), {"0.jpg", "1.jpg", "2.jpg"})
    assert re.search(expected, reason), reason


def test_why_there_is_nothing() -> None:
    turning = [pair(0, 1, Verdict.PURE_ROTATION), pair(1, 4, Verdict.PURE_ROTATION), pair(2, 3, Verdict.WEAK, 0)]
    assert "pure rotation: 3 photos" in why_nothing(turning)
    assert "different positions" in why_nothing(turning)
    apart = why_nothing([pair(0, 1, Verdict.WEAK, 0), pair(1, 2, Verdict.TOO_FEW, 0)])
    assert "no two photos" in apart
    assert "overlap" in apart
    assert "watermark" not in apart
    marked = why_nothing([pair(0, 1, Verdict.WEAK, 0), pair(1, 2, Verdict.WATERMARK, 0)])
    assert "no two photos" in marked
    assert "1 pairs match only on" in marked
    assert "watermark" in marked


def test_what_is_known_of_a_turning_camera_is_said() -> None:
    turn = AlignmentResult(
        images=np.array([1, 3], np.int32),
        edges=np.array([0], np.int32),
        cam_from_world=np.tile(np.eye(3, 4), (2, 1, 1)),
        residual_deg=np.array([0.1, 0.2]),
        history=(1.0,),
        stop_reason="",
        focal_px=np.array([80.0, 90.0]),
        rotation_sigma_deg=np.array([0.011, 0.027]),
    )
    turning = [pair(1, 3, Verdict.PURE_ROTATION)]
    assert "rotations.json" not in why_nothing(turning)
    expected = "known (to about 0.027°, as far as the noise of the matches goes), and stands in rotations.json"
    assert expected in why_nothing(turning, [turn])
    said = say_turn(turn, photos(5).names)
    assert "pure rotation: 2 photos, from 1.jpg to 3.jpg" in said
    assert expected in said
    (part,) = describe_turns([turn], photos(5).names)
    assert part["kind"] == "pure rotation"
    assert part["photos"][1] == {
        "name": "3.jpg",
        "cam_from_world_rotation": np.eye(3).tolist(),
        "focal_px": 90.0,
        "residual_deg": 0.2,
        "sigma_deg": 0.027,
    }


def test_nothing_was_matched() -> None:
    assert "no pair of photos was matched; raise the time budget" in why_nothing([])


def test_pairs_that_alignment_dropped_are_named_with_their_errors() -> None:
    scene = ring(8, turn_deg=200)
    images = [(first, second) for first, second in combinations(range(8), 2) if second - first < 4]
    matches = [scene.matches(*images) for images in images]
    wrong = [number for number, pair in enumerate(images) if pair in ((1, 4), (2, 3))]
    rng = np.random.default_rng(0)
    for number in wrong:
        matches[number] = turned_wrong(matches[number], rng)
    names = [f"{image}.jpg" for image in range(8)]
    parts = align(matches, 8, AlignConfig())
    found = rejected_pairs(matches, parts, names)
    assert {(one.first, one.second) for one in found} == {("1.jpg", "4.jpg"), ("2.jpg", "3.jpg")}
    assert found[0].matches >= found[1].matches
    for one in found:
        number = next(n for n in wrong if (names[images[n][0]], names[images[n][1]]) == (one.first, one.second))
        turned = matches[number].second_from_first[:, :3] @ scene.second_from_first(*images[number])[:, :3].T
        angle = np.degrees(np.arccos((np.trace(turned) - 1) / 2))
        assert one.matches == len(matches[number])
        assert one.rotation_error_deg == pytest.approx(angle, abs=0.1)
        assert one.direction_error_deg is not None
        assert 0 <= one.direction_error_deg <= 180
    right = [match for number, match in enumerate(matches) if number not in wrong]
    assert rejected_pairs(right, align(right, 8, AlignConfig()), names) == ()


def test_a_dropped_pair_between_parts_has_no_errors() -> None:
    scene = ring(8)
    rng = np.random.default_rng(1)
    matches = [scene.matches(*pair) for pair in (*combinations(range(4), 2), *combinations(range(4, 8), 2))]
    matches += [turned_wrong(scene.matches(*pair), rng) for pair in ((0, 5), (1, 6), (2, 4), (3, 7))]
    parts = align(matches, 8, AlignConfig())
    assert len(parts) == 2
    found = rejected_pairs(matches, parts, [str(image) for image in range(8)])
    assert {(one.first, one.second) for one in found} == {("0", "5"), ("1", "6"), ("2", "4"), ("3", "7")}
    assert all(one.rotation_error_deg is None and one.direction_error_deg is None for one in found)
