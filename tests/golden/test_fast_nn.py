"""Parity of reciprocal matching with fast_nn.npz: the same matches in the same order, by fast and by plain search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mast3r_sfm.matching.blocks import DescriptorMap
from mast3r_sfm.matching.exhaustive import PlainMap
from mast3r_sfm.matching.reciprocal import (
    FusedMatches,
    PixelPairs,
    SearchableMap,
    find_reciprocal,
    find_round_trips,
    grid_seeds,
    match_prediction,
    match_predictions,
)
from mast3r_sfm.types import PairPrediction, ViewPrediction

Golden = dict[str, NDArray[Any]]

KINDS = [DescriptorMap, PlainMap]
"""How nearest neighbours are found."""


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> Golden:
    with np.load(golden_dir / "fast_nn.npz") as file:
        return {name: file[name] for name in file.files}


def maps(golden: Golden, kind: Any, *names: str, euclidean: bool = False) -> list[SearchableMap]:
    return [kind.build(torch.from_numpy(golden[name]), euclidean=euclidean) for name in names]


def ab(golden: Golden, kind: Any, *, euclidean: bool = False) -> list[SearchableMap]:
    return maps(golden, kind, "ab/desc1_f16", "ab/desc2_f16", euclidean=euclidean)


def from_grid(first: SearchableMap, second: SearchableMap, step: int) -> PixelPairs:
    return find_reciprocal(first, second, grid_seeds(first.size, step)).pairs


def xy(index: Tensor, width: int) -> NDArray[np.int64]:
    return np.stack([index.numpy() % width, index.numpy() // width], axis=1)


def assert_same(pairs: PixelPairs, golden: Golden, case: str, widths: tuple[int, int]) -> None:
    """Pairs are those of a golden case, in its order."""
    np.testing.assert_array_equal(xy(pairs.first, widths[0]), golden[f"{case}/xy1"])
    np.testing.assert_array_equal(xy(pairs.second, widths[1]), golden[f"{case}/xy2"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [8, 4, 3])
def test_matches_from_a_grid(golden: Golden, kind: Any, step: int) -> None:
    first, second = ab(golden, kind)
    assert_same(from_grid(first, second, step), golden, f"ab/sub{step}", (128, 128))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_and_basin(golden: Golden, kind: Any) -> None:
    first, second = ab(golden, kind)
    found = find_reciprocal(first, second, grid_seeds(first.size, 8))
    np.testing.assert_array_equal(found.pairs.first.numpy(), golden["ab/sub8_idx/xy1"])
    np.testing.assert_array_equal(found.pairs.second.numpy(), golden["ab/sub8_idx/xy2"])
    assert_same(found.pairs, golden, "ab/sub8_basin", (128, 128))
    # The golden basin has one entry more, which is never set.
    np.testing.assert_array_equal(np.append(found.basin.numpy(), -1), golden["ab/sub8_basin/basin"])


@pytest.mark.parametrize("kind", KINDS)
def test_matches_by_distance(golden: Golden, kind: Any) -> None:
    assert_same(from_grid(*ab(golden, kind, euclidean=True), 8), golden, "ab/sub8_l2", (128, 128))


@pytest.mark.parametrize("kind", KINDS)
def test_points_are_matched_by_distance(golden: Golden, kind: Any) -> None:
    first, second = maps(golden, kind, "pts/p1", "pts/p2", euclidean=True)
    assert_same(from_grid(first, second, 4), golden, "pts/sub4", (56, 44))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tolerance", [0, 2, 5, 12])
def test_given_pixels_with_tolerance(golden: Golden, kind: Any, tolerance: int) -> None:
    first, second = ab(golden, kind)
    x, y = (torch.from_numpy(golden[f"ab/init_{axis}1"]).long() for axis in "xy")
    pairs = find_round_trips(first, second, 128 * y + x, tolerance_px=tolerance)
    assert_same(pairs, golden, f"ab/init_tol{tolerance}", (128, 128))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_nearest_neighbours_of_all(golden: Golden, kind: Any, metric: str) -> None:
    first, second = (
        kind.build(torch.from_numpy(golden[f"ab/desc{view}_f16"][::4, ::4]), euclidean=metric == "l2")
        for view in (1, 2)
    )
    np.testing.assert_array_equal(second.nearest(first.features).numpy(), golden[f"brute/{metric}/nn_1to2"])
    np.testing.assert_array_equal(first.nearest(second.features).numpy(), golden[f"brute/{metric}/nn_2to1"])


def test_repeated_matches_are_merged(golden: Golden) -> None:
    first, second = (torch.from_numpy(golden[f"merge/idx{view}"]).long() for view in (1, 2))
    pairs, occurrence = PixelPairs(first=first, second=second).unique()
    widths = int(golden["merge/shape1"][1]), int(golden["merge/shape2"][1])
    assert_same(pairs, golden, "merge", widths)
    np.testing.assert_array_equal(occurrence.numpy(), golden["merge/first_index"])


def prediction(golden: Golden, first: str, second: str) -> PairPrediction:
    """One decode of the golden pair: `first` and `second` are 11 and 21, or 22 and 12."""

    def no_points(index: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError(f"matching asked for the points at {index}")

    one, other = (
        ViewPrediction(
            descriptors=torch.from_numpy(golden[f"sym/desc{view}_f16"]),
            descriptor_confidence=torch.from_numpy(golden[f"sym/qonf{view}"]),
            points_at=no_points,
        )
        for view in (first, second)
    )
    return PairPrediction(first=one, second=other)


def assert_confident(matches: FusedMatches, golden: Golden, case: str) -> None:
    assert_same(matches.pairs, golden, case, (80, 56))
    np.testing.assert_allclose(matches.confidence.numpy(), golden[f"{case}/conf"], rtol=1e-6)


@pytest.mark.parametrize("step", [8, 4])
def test_both_decodes_are_fused(golden: Golden, step: int) -> None:
    fused = match_predictions(prediction(golden, "11", "21"), prediction(golden, "22", "12"), step)
    assert_confident(fused, golden, f"sym/sub{step}")


@pytest.mark.parametrize(("step", "tolerance"), [(8, 0), (8, 5), (4, 3)])
def test_one_decode(golden: Golden, step: int, tolerance: int) -> None:
    found = match_prediction(prediction(golden, "11", "21"), step, tolerance_px=tolerance or None)
    assert_confident(found, golden, f"nonsym/sub{step}_tol{tolerance}")
