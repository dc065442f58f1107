"""What a user is told of photos that stand in no model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.reasons import why_left_out, why_nothing
from mast3r_sfm.types import ImageRecord, ImageSet, PairMatches, Verdict


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
        ([], "no other photo was found"),
        ([pair(0, 3, Verdict.WEAK, 0), pair(1, 3, Verdict.TOO_FEW, 0)], "no other photo was found"),
        (
            [pair(0, 3, Verdict.WATERMARK, 0), pair(2, 3, Verdict.WATERMARK, 0), pair(1, 3, Verdict.WEAK, 0)],
            "matches 2 other photos, but only on .* watermark",
        ),
        ([pair(0, 3, Verdict.WATERMARK, 0), pair(3, 4, Verdict.GOOD)], r"matches only 4\.jpg, too little"),
        ([pair(3, 4, Verdict.GOOD)], r"matches only 4\.jpg, too little"),
        ([pair(0, 3, Verdict.PURE_ROTATION), pair(1, 3, Verdict.WEAK, 0)], r"same point as 0\.jpg"),
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
    assert "no two photos" in why_nothing([])
    assert "watermark" not in apart
    marked = why_nothing([pair(0, 1, Verdict.WEAK, 0), pair(1, 2, Verdict.WATERMARK, 0)])
    assert "no two photos" in marked
    assert "1 pairs match only on" in marked
    assert "watermark" in marked
