"""Reciprocal matching: the fast search against the exhaustive one on any maps, and what matches promise."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.matching import blocks
from mast3r_sfm.matching.blocks import DescriptorMap
from mast3r_sfm.matching.exhaustive import PlainMap, score_pairs
from mast3r_sfm.matching.reciprocal import (
    PixelPairs,
    find_reciprocal,
    find_round_trips,
    grid_seeds,
    match_both_ways,
    match_prediction,
    match_predictions,
)
from mast3r_sfm.types import Float64, PairPrediction, ViewPrediction

KINDS = (
    "random",
    "unit",
    "smooth",
    "noisy",
    "constant",
    "nearly constant",
    "few",
    "whole numbers",
    "zero",
    "far away",
    "outliers",
    "tiny",
    "huge",
)
SIDES = st.sampled_from([1, 2, 7, 8, 9, 16, 33, 64])


def values(kind: str, rng: np.random.Generator, shape: tuple[int, int, int]) -> Float64:
    """[H, W, D] descriptors of a kind; whole numbers, few and constant ones tie."""
    height, width, channels = shape
    if kind in ("smooth", "noisy"):
        rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        slope = rng.normal(size=(2, channels)) / rng.uniform(5, 40)
        wave = np.cos(rows[..., None] * slope[0] + columns[..., None] * slope[1] + rng.uniform(0, 6, channels))
        wave += 0.1 * (kind == "noisy") * rng.normal(size=shape)
        return np.asarray(wave / np.linalg.norm(wave, axis=-1, keepdims=True))
    noise = rng.normal(size=shape)
    made: dict[str, Float64] = {
        "random": noise,
        "unit": noise / np.linalg.norm(noise, axis=-1, keepdims=True),
        "constant": np.full(shape, 0.3),
        "nearly constant": 0.3 + 1e-7 * noise,
        "few": rng.normal(size=(4, channels))[rng.integers(0, 4, (height, width))],
        "whole numbers": rng.integers(-1, 2, shape).astype(np.float64),
        "zero": np.zeros(shape),
        "far away": 1000 + noise,
        "outliers": noise * np.where(rng.random((height, width, 1)) < 0.03, 1e6, 1),
        "tiny": 1e-25 * noise,
        "huge": 1e14 * noise,
    }
    return made[kind]


def make(kind: str, rng: np.random.Generator, height: int, width: int, channels: int) -> Tensor:
    return torch.from_numpy(values(kind, rng, (height, width, channels)).astype(np.float32))


def assert_same(found: PixelPairs, expected: PixelPairs) -> None:
    np.testing.assert_array_equal(found.first.numpy(), expected.first.numpy())
    np.testing.assert_array_equal(found.second.numpy(), expected.second.numpy())


def as_set(pairs: PixelPairs) -> set[tuple[int, int]]:
    return set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))


@settings(max_examples=250)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.tuples(SIDES, SIDES, SIDES, SIDES),
    st.sampled_from([1, 3, 24]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["guess", "no guess", "rounded products"]),
    st.integers(0, 10_000),
)
def test_the_fast_search_is_the_exhaustive_one(
    kind: str,
    other: str,
    sides: tuple[int, int, int, int],
    channels: int,
    euclidean: bool,
    bounded: bool,
    how: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    asked, searched = make(kind, rng, *sides[:2], channels), make(other, rng, *sides[2:], channels)
    build = with_rounded_products if how == "rounded products" else DescriptorMap.build
    fast = build(searched, euclidean=euclidean, bounded=bounded)
    queries = asked.flatten(0, 1)[torch.from_numpy(rng.integers(0, sides[0] * sides[1], rng.integers(0, 200)))]
    guess = torch.from_numpy(rng.integers(0, sides[2] * sides[3], len(queries))) if how == "guess" else None
    expected = PlainMap.build(searched, euclidean=euclidean).nearest(queries)
    np.testing.assert_array_equal(fast.nearest(queries, guess).numpy(), expected.numpy())


def with_rounded_products(descriptors: Tensor, *, euclidean: bool, bounded: bool) -> DescriptorMap:
    """A map whose float32 products are as inexact as those of a GPU may be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_input_rounding", lambda device: 2.0**-8)  # noqa: ARG005
        coarse = DescriptorMap.build(descriptors, euclidean=euclidean, bounded=bounded)
    generator = torch.Generator().manual_seed(0)
    scale = 1 + 2.0**-9 * (2 * torch.rand(coarse.members.shape, generator=generator) - 1)
    return replace(coarse, members=coarse.members * scale)


@settings(max_examples=100)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.tuples(SIDES, SIDES, SIDES, SIDES),
    st.booleans(),
    st.integers(1, 5),
    st.integers(0, 10_000),
)
def test_reciprocal_matches_are_those_of_the_exhaustive_search(
    kind: str, other: str, sides: tuple[int, int, int, int], euclidean: bool, step: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    maps = make(kind, rng, *sides[:2], 8), make(other, rng, *sides[2:], 8)
    fast = [DescriptorMap.build(one, euclidean=euclidean) for one in maps]
    plain = [PlainMap.build(one, euclidean=euclidean) for one in maps]
    seeds = grid_seeds(fast[0].size, step)
    found, expected = find_reciprocal(*fast, seeds), find_reciprocal(*plain, seeds)
    assert_same(found.pairs, expected.pairs)
    np.testing.assert_array_equal(found.basin.numpy(), expected.basin.numpy())
    for tolerance in (0, 2.5):
        some = (find_round_trips(*pair, seeds, tolerance_px=tolerance) for pair in (fast, plain))
        assert_same(*some)


@settings(max_examples=50)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.tuples(SIDES, SIDES, SIDES, SIDES),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_matches_are_mutual_and_ordered_and_do_not_depend_on_which_map_is_first(
    kind: str, other: str, sides: tuple[int, int, int, int], euclidean: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    first, second = (
        DescriptorMap.build(make(name, rng, *size, 8), euclidean=euclidean)
        for name, size in ((kind, sides[:2]), (other, sides[2:]))
    )
    pairs, _ = match_both_ways(first, second, 3).unique()
    swapped, _ = match_both_ways(second, first, 3).unique()
    assert as_set(pairs) == as_set(swapped.swapped)
    assert_same(match_both_ways(first, second, 3).unique()[0], pairs)
    rows = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert all(one < next_one for one, next_one in pairwise(rows))
    np.testing.assert_array_equal(second.nearest(first.features[pairs.first]).numpy(), pairs.second.numpy())
    np.testing.assert_array_equal(first.nearest(second.features[pairs.second]).numpy(), pairs.first.numpy())


@pytest.mark.parametrize("euclidean", [False, True])
@pytest.mark.parametrize("kind", ["whole numbers", "few", "unit"])
def test_the_exhaustive_search_is_what_numpy_computes(kind: str, euclidean: bool) -> None:
    """Of whole numbers float64 sums are exact in any order, so ties are ties; they go to the first."""
    rng = np.random.default_rng(0)
    database, queries = values(kind, rng, (40, 50, 5)), values(kind, rng, (10, 30, 5)).reshape(-1, 5)
    database, queries = database.astype(np.float32).astype(np.float64), queries.astype(np.float32).astype(np.float64)
    flat = database.reshape(-1, 5)
    score = -((queries[:, None] - flat) ** 2).sum(axis=2) if euclidean else queries @ flat.T
    target = PlainMap.build(torch.from_numpy(database), euclidean=euclidean)
    found = target.nearest(torch.from_numpy(queries).float()).numpy()
    if kind == "unit":  # sums in another order may differ in the last digit
        np.testing.assert_allclose(score[np.arange(300), found], score.max(axis=1), atol=1e-14)
    else:
        np.testing.assert_array_equal(found, score.argmax(axis=1))
    if kind != "unit":
        assert ((score == score.max(axis=1, keepdims=True)).sum(axis=1) > 1).mean() > 0.9


def test_a_score_does_not_depend_on_what_is_computed_with_it() -> None:
    rng = np.random.default_rng(0)
    left, right = (make("random", rng, 1, 1000, 24)[0] for _ in range(2))
    for euclidean in (False, True):
        together = score_pairs(left, right, euclidean=euclidean)
        alone = [score_pairs(left[i, None], right[i, None], euclidean=euclidean) for i in range(0, 1000, 37)]
        assert torch.equal(together[::37], torch.cat(alone))


@pytest.mark.parametrize("bounded", [False, True])
def test_many_blocks_and_seeds_are_searched_in_parts(bounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.ELEMENTS_AT_ONCE, "cpu", 1 << 10)
    monkeypatch.setattr(blocks, "CANDIDATES_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    for kind in ("noisy", "random", "few"):
        asked, searched = (make(kind, rng, 50, 70, 24) for _ in range(2))
        queries = asked[2::5, 2::5].flatten(0, 1)
        found = DescriptorMap.build(searched, bounded=bounded).nearest(queries)
        np.testing.assert_array_equal(found.numpy(), PlainMap.build(searched).nearest(queries).numpy())


def test_bounds_rule_out_nearly_all_blocks_of_a_smooth_map() -> None:
    """Otherwise the search would be exact, but slow."""
    rng = np.random.default_rng(0)
    asked = make("smooth", rng, 120, 160, 24)
    target = DescriptorMap.build(asked)
    queries = asked[4::8, 4::8].flatten(0, 1)
    assert target.bounds is not None
    own = score_pairs(queries, queries, euclidean=False).float() - 1e-5
    left = target.bounds.left(slice(None), target.bounds.of_queries(queries, queries.norm(dim=1), own))
    assert left.any(dim=0).all()
    assert left.float().mean() < 0.1
    at = grid_seeds((120, 160), 8)
    np.testing.assert_array_equal(target.nearest(queries).numpy(), at.numpy())


def test_half_precision_is_cast_up() -> None:
    rng = np.random.default_rng(0)
    first, second = (make("noisy", rng, 30, 40, 24).half() for _ in range(2))
    half, full = (
        [DescriptorMap.build(one.to(kind)) for one in (first, second)] for kind in (torch.float16, torch.float32)
    )
    seeds = grid_seeds((30, 40), 3)
    assert_same(find_reciprocal(*half, seeds).pairs, find_reciprocal(*full, seeds).pairs)


def test_a_shifted_map_is_matched_with_itself() -> None:
    rng = np.random.default_rng(0)
    whole = make("unit", rng, 60, 80, 24)
    first, second = DescriptorMap.build(whole[:50, :70]), DescriptorMap.build(whole[10:, 4:])
    pairs, _ = match_both_ways(first, second, 4).unique()
    rows, columns = pairs.first // 70, pairs.first % 70
    true = (rows - 10 == pairs.second // 76) & (columns - 4 == pairs.second % 76)
    inside = (rows >= 10) & (columns >= 4)
    assert true[inside].all()
    grid = grid_seeds((50, 70), 4)
    assert set(grid[(grid // 70 >= 10) & (grid % 70 >= 4)].tolist()) <= set(pairs.first[true].tolist())


def test_the_rounds_are_limited() -> None:
    """Descriptors along a line, each nearest to the next on the other side: the seed moves on every round."""
    places = torch.tensor([0.0, 2.0, 3.8, 5.4, 6.8, 8.0])
    first = DescriptorMap.build(places[None, 0::2, None], euclidean=True)
    second = DescriptorMap.build(places[None, 1::2, None], euclidean=True)
    seed = torch.tensor([0])
    for rounds, expected in ((0, []), (1, []), (2, []), (3, [2])):
        found = find_reciprocal(first, second, seed, rounds=rounds)
        assert found.pairs.first.tolist() == found.pairs.second.tolist() == expected
        assert found.basin.tolist() == [1, 2, 2][:rounds] + [-1] * (3 - rounds)


def test_tolerance_is_a_distance_in_pixels() -> None:
    """One start, whose way back ends 3 rows and 4 columns away."""
    first = torch.zeros(6, 7, 1)
    first[0, 0], first[3, 4] = 0.6, 1.0
    maps = DescriptorMap.build(first), DescriptorMap.build(torch.ones(1, 1, 1))
    for tolerance, expected in ((0, []), (4.9, []), (5, []), (5.1, [0])):
        found = find_round_trips(*maps, torch.tensor([0, 0]), tolerance_px=tolerance)
        assert found.first.tolist() == expected
    assert find_round_trips(*maps, torch.tensor([25])).first.tolist() == [25]


def test_seeds_of_a_grid() -> None:
    assert grid_seeds((5, 7), 3).tolist() == [7 * row + column for row in (1, 4) for column in (1, 4)]
    assert grid_seeds((2, 3), 1).tolist() == list(range(6))
    assert grid_seeds((1, 30), 8).tolist() == []
    assert grid_seeds((5, 5), 8).tolist() == [24]


def test_no_seeds_no_matches() -> None:
    maps = [DescriptorMap.build(torch.ones(3, 4, 5)) for _ in range(2)]
    nothing = torch.zeros(0, dtype=torch.int64)
    found = find_reciprocal(*maps, nothing)
    assert len(found.pairs) == 0
    assert (found.basin == -1).all()
    assert len(find_round_trips(*maps, nothing)) == 0
    assert len(match_both_ways(*maps, 20).unique()[0]) == 0
    assert maps[0].nearest(torch.zeros(0, 5)).shape == (0,)
    assert PlainMap.build(torch.ones(3, 4, 5)).nearest(torch.zeros(0, 5)).shape == (0,)


def prediction(seed: int, sizes: tuple[tuple[int, int], tuple[int, int]]) -> PairPrediction:
    """Two crops of one picture that few pixels outside the common part match in; with noise of the decode."""
    picture = make("unit", np.random.default_rng(99), 48, 48, 24)
    rng = np.random.default_rng(seed)
    one, other = (
        ViewPrediction(
            descriptors=picture[: size[0], : size[1]] + 0.12 * make("random", rng, *size, 24),
            descriptor_confidence=torch.from_numpy(rng.uniform(0.5, 9, size).astype(np.float32)),
            points_at=lambda index: (index, index),
        )
        for size in sizes
    )
    return PairPrediction(first=one, second=other)


def test_both_decodes_are_joined() -> None:
    sizes = (32, 40), (48, 24)
    forward, backward = prediction(0, sizes), prediction(1, sizes[::-1])
    fused = match_predictions(forward, backward, 4)
    found = {}
    for decode, views in ((backward, (backward.second, backward.first)), (forward, (forward.first, forward.second))):
        maps = [DescriptorMap.build(view.descriptors) for view in (decode.first, decode.second)]
        pairs, _ = match_both_ways(maps[0], maps[1], 4).unique()
        for one, other in as_set(pairs if decode is forward else pairs.swapped):
            sure = views[0].descriptor_confidence.flatten()[one], views[1].descriptor_confidence.flatten()[other]
            found[one, other] = float(sure[0] * sure[1]) ** 0.5
    assert 50 < len(found) < 300
    assert len(set(found)) > len(as_set(match_prediction(forward, 4).pairs))
    assert list(zip(fused.pairs.first.tolist(), fused.pairs.second.tolist(), strict=True)) == sorted(found)
    np.testing.assert_allclose(fused.confidence.numpy(), [found[pair] for pair in sorted(found)], rtol=1e-6)


def test_swapped_images_have_the_same_matches() -> None:
    sizes = (32, 40), (48, 24)
    forward, backward = prediction(2, sizes), prediction(3, sizes[::-1])
    assert as_set(match_predictions(forward, backward, 4).pairs) == as_set(
        match_predictions(backward, forward, 4).pairs.swapped
    )


def test_one_decode_is_as_sure_as_its_less_sure_pixel() -> None:
    decode = prediction(4, ((32, 40), (48, 24)))
    found = match_prediction(decode, 4)
    assert len(found.pairs) > 10
    one = decode.first.descriptor_confidence.flatten()[found.pairs.first]
    other = decode.second.descriptor_confidence.flatten()[found.pairs.second]
    np.testing.assert_array_equal(found.confidence.numpy(), np.minimum(one.numpy(), other.numpy()))
    assert len(match_prediction(decode, 4, tolerance_px=3).pairs) > 10


def test_autocast_of_the_caller_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    target = DescriptorMap.build(make("random", rng, 40, 50, 24))
    queries = make("random", rng, 1, 200, 24)[0]
    expected = target.nearest(queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(target.nearest(queries), expected)


def test_coarse_products_are_allowed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = DescriptorMap.build(torch.ones(2, 2, 4)).slack
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    coarse = DescriptorMap.build(torch.ones(2, 2, 4)).slack
    assert fine < 1e-5
    assert coarse > 2 * 2.0**-8  # both factors rounded to bfloat16

    def undecided() -> str:
        raise RuntimeError("two settings contradict each other")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", undecided)
    assert DescriptorMap.build(torch.ones(2, 2, 4)).slack == coarse


@pytest.mark.parametrize("shape", [(3, 4), (0, 4, 5), (3, 0, 5), (3, 4, 0), (1, 3, 4, 5)])
def test_what_is_no_map_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"expected \[H, W, D\]"):
        DescriptorMap.build(torch.ones(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_values_that_cannot_be_compared_are_refused(value: float) -> None:
    descriptors = torch.ones(9, 9, 3)
    descriptors[8, 8, 1] = value
    with pytest.raises(ShapeError, match="NaN, infinite or enormous"):
        DescriptorMap.build(descriptors)


def test_queries_of_another_length_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"expected \[Q, 5\]"):
        DescriptorMap.build(torch.ones(3, 4, 5)).nearest(torch.ones(2, 4))


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ShapeError, match="must both be"):
        PixelPairs(first=torch.zeros(3, dtype=torch.int64), second=torch.zeros(2, dtype=torch.int64))
