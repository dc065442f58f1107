"""Pairs by the order of names, by GPS positions and from a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.errors import InputError
from mast3r_sfm.retrieval.sources import (
    gps_pairs,
    read_pairs,
    sequences,
    sequential_pairs,
    swin_pairs,
)
from mast3r_sfm.types import ImageRecord, Int64
from tests.exact import Listener

Gps = tuple[float, float, float]


def unordered(pairs: Int64) -> set[tuple[int, int]]:
    return {(min(pair), max(pair)) for pair in pairs.tolist()}


def records(positions: Sequence[Gps | None]) -> list[ImageRecord]:
    return [
        ImageRecord(name=f"{index}.jpg", width_px=64, height_px=64, sha256="", gps=gps)
        for index, gps in enumerate(positions)
    ]


def test_sequences_count_as_people_do_and_end_with_the_folder() -> None:
    names = ["a/f1.jpg", "a/f10.jpg", "a/f2.jpg", "b/x.jpg", "b/x007.jpg", "b/x07.jpg", "c.jpg"]
    assert [order.tolist() for order in sequences(names)] == [[0, 2, 1], [4, 5, 3], [6]]


def test_sequential_pairs_are_the_next_ones_and_some_far_ones() -> None:
    names = [f"{index}.jpg" for index in range(30)]
    steps = {j - i for i, j in unordered(sequential_pairs(names, 3))}
    assert steps == {1, 2, 3, 6, 12, 24}
    assert {j - i for i, j in unordered(sequential_pairs(names, 1))} == {1, 2}
    assert len(unordered(sequential_pairs(names, 3))) == sum(30 - step for step in steps)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=3), window=st.integers(1, 12))
def test_no_pair_leaves_its_folder_or_holds_one_image_twice(counts: list[int], window: int) -> None:
    names = [f"{folder}/{index}.jpg" for folder, count in enumerate(counts) for index in range(count)]
    for source in (sequential_pairs, swin_pairs):
        pairs = source(names, window)
        assert pairs.shape[1:] == (2,)
        for i, j in pairs.tolist():
            assert i != j
            assert names[i].split("/")[0] == names[j].split("/")[0]
        linked = {frozenset(pair) for pair in pairs.tolist()}
        start = 0
        for count in counts:
            assert all(frozenset((i, i + 1)) in linked for i in range(start, start + count - 1))
            start += count


def test_swin_closes_the_circle() -> None:
    names = [f"{index}.jpg" for index in range(6)]
    assert unordered(swin_pairs(names, 1)) == {(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 5)}
    assert len(unordered(swin_pairs(names, 99))) == 15


def test_gps_pairs_are_the_nearest_on_the_ground() -> None:
    # Two groups 5 km apart; altitudes that would mix them up if they counted.
    positions: list[Gps | None] = [(50.0, 10.0, 0.0), (50.0001, 10.0, 9000.0), (50.0, 10.0002, 0.0), None]
    positions += [(50.05, 10.0, 0.0), (50.0501, 10.0, 9000.0)]
    assert unordered(gps_pairs(records(positions), 1)) == {(0, 1), (0, 2), (4, 5)}
    assert unordered(gps_pairs(records(positions), 2)) == {(0, 1), (0, 2), (1, 2), (4, 5), (1, 4), (1, 5)}
    everything = unordered(gps_pairs(records(positions), 50))
    assert len(everything) == 10
    assert not any(3 in pair for pair in everything)


def test_photos_taken_at_one_place_are_pairs() -> None:
    assert unordered(gps_pairs(records([(1.0, 1.0, 0.0)] * 3), 2)) == {(0, 1), (0, 2), (1, 2)}


@pytest.mark.parametrize("known", [0, 1])
def test_without_positions_there_are_no_gps_pairs(known: int) -> None:
    positions: list[Gps | None] = [(1.0, 1.0, 0.0)] * known + [None, None]
    with pytest.raises(InputError, match=rf"{known} of {known + 2} photos have a GPS position.*--pairs retrieval"):
        gps_pairs(records(positions), 3)


NAMES = ["a.jpg", "b c.jpg", "b.jpg", "c.jpg", "d/a b.jpg"]


def write(folder: Path, text: str) -> Path:
    path = folder / "pairs.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_list_is_read(tmp_path: Path) -> None:
    listener = Listener()
    path = write(tmp_path, "# ours\na.jpg b.jpg\n\n  c.jpg a.jpg  \nb c.jpg d/a b.jpg\nb.jpg b c.jpg\na.jpg gone.jpg\n")
    pairs = read_pairs(path, NAMES, ["gone.jpg"], listener)
    assert pairs.tolist() == [[0, 2], [3, 0], [1, 4], [2, 1]]
    (warning,) = listener.warnings
    assert "1 pairs name photos that are left out" in warning


def test_a_list_with_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_bytes("\ufeffa.jpg b.jpg\r\nb.jpg c.jpg\r\n".encode())
    assert read_pairs(path, NAMES, [], Listener()).tolist() == [[0, 2], [2, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg b.jpg\na.jpg x.jpg\n", "line 2: 'a.jpg x.jpg' is not two names of photos"),
        ("a.jpg\n", "line 1: 'a.jpg' is not two names"),
        ("a.jpg b.jpg c.jpg\n", "line 1"),
        ("c.jpg c.jpg\n", "line 1: a photo cannot be matched with itself"),
        ("", "holds no pair"),
        ("gone.jpg a.jpg\n", "holds no pair"),
    ],
)
def test_a_wrong_list_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_pairs(write(tmp_path, text), NAMES, ["gone.jpg"], Listener())


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the list of pairs .*No such file"):
        read_pairs(tmp_path / "none.txt", NAMES, [], Listener())
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text in UTF-8"):
        read_pairs(tmp_path / "binary", NAMES, [], Listener())
