"""Parity of the choice of windows with coarse_to_fine.json, number by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mast3r_sfm.matching.windows import Size, Tiling, greedy, grid, norm_windows, select, start_pos, window_size

Cases = list[dict[str, Any]]


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Cases]:
    cases: dict[str, Cases] = json.loads((golden_dir / "coarse_to_fine.json").read_text(encoding="utf-8"))
    return cases


def size(height_width: list[int] | None) -> Size | None:
    return None if height_width is None else (height_width[1], height_width[0])


def test_window_starts(golden: dict[str, Cases]) -> None:
    for case in golden["start_pos"]:
        assert start_pos(case["total"], case["win"], case["overlap"]).tolist() == case["starts"]


def test_grids(golden: dict[str, Cases]) -> None:
    for case in golden["grid"]:
        photo = (case["W"], case["H"])
        windows = grid(photo, window_size(photo, case["size"]), case["overlap"])
        if "error" in case:
            # The reference raises where a photo is smaller than a window; ours takes the whole photo.
            assert windows.tolist() == [[0, 0, *photo]]
            continue
        assert len(windows) == case["n"]
        assert windows[:: case["stored_every"]].tolist() == case["cells_ltrb"]


def test_windows_of_one_shape(golden: dict[str, Cases]) -> None:
    for case in golden["norm_windows"]:
        windows = norm_windows(np.array(case["cells_in"]), (case["W"], case["H"]), size(case["forced_resolution"]))
        assert windows.tolist() == case["cells_out"]


def test_greedy_choice(golden: dict[str, Cases]) -> None:
    for case in golden["greedy"]:
        assert greedy(np.array(case["weights"]), case["target"]).tolist() == case["order"]


def tilings(case: dict[str, Any]) -> tuple[Tiling, Tiling]:
    forced = case["forced_resolution_HW"]
    shapes = forced if isinstance(forced[0], list) or forced[0] is None else [forced, forced]
    first, second = (
        Tiling(photo=photo, window=window_size(photo, case["maxdim"]), shape=size(shape))
        for photo, shape in zip(((w, h) for h, w in (case["query_HW"], case["ref_HW"])), shapes, strict=True)
    )
    return first, second


def test_window_pairs(golden: dict[str, Cases]) -> None:
    for case in golden["select"]:
        xy = tuple(np.array(case[name], np.float64).reshape(-1, 2) for name in ("pos_query", "pos_ref"))
        first, second = select((xy[0], xy[1]), tilings(case), overlap=case["overlap"])
        if "error" in case:
            # The reference cannot do without a given shape; ours takes windows that hold the matches.
            assert len(first) == len(second) > 0
            continue
        assert first.tolist() == case["crops_query_ltrb"]
        assert second.tolist() == case["crops_ref_ltrb"]
