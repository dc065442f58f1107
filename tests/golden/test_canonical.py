"""Parity with the reference's canonical pointmaps, focal lengths, anchors and scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.alignment.canonical import (
    CanonicalSums,
    CanonicalView,
    depth_at_focal,
    focal_of_pointmap,
    score_pair,
)
from mast3r_sfm.types import Float64

CLOSE = 1e-5


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> Mapping[str, Float64]:
    with np.load(golden_dir / "canonical.npz") as file:
        return {name: file[name].astype(np.float64) if file[name].dtype.kind == "f" else file[name] for name in file}


def _view(golden: Mapping[str, Float64], case: str) -> CanonicalView:
    prefix = f"canon/{case}/"
    confidences = golden[prefix + "confs"]
    height, width = confidences.shape[1:]
    sums = CanonicalSums((height, width), int(golden[prefix + "subsample"]), align_scales=False)
    for points, confidence in zip(golden[prefix + "ptmaps"], confidences, strict=True):
        sums.add(points, confidence)
    return sums.view(np.array([width / 2, height / 2]))


@pytest.mark.parametrize("case", ["a", "b_portrait", "c_sub4"])
def test_a_canonical_view_is_the_reference_s(golden: Mapping[str, Float64], case: str) -> None:
    prefix = f"canon/{case}/"
    view = _view(golden, case)
    distance = np.linalg.norm(view.points - golden[prefix + "canon"], axis=-1)
    assert (distance <= CLOSE * np.linalg.norm(golden[prefix + "canon"], axis=-1)).all()
    np.testing.assert_allclose(view.confidence, golden[prefix + "canon_conf"], rtol=CLOSE)
    np.testing.assert_allclose(view.relative_depth, golden[prefix + "canon2_avg-angle"], rtol=CLOSE)
    np.testing.assert_allclose(view.anchor_depth, golden[prefix + "core_depth"], rtol=CLOSE)
    np.testing.assert_allclose(view.focal_px, golden[prefix + "focal_weiszfeld_clipped"], rtol=CLOSE)
    for number in (0, 1):
        anchors = view.anchors(golden[f"{prefix}anchor{number}/pixels_xy"].astype(np.int64))
        np.testing.assert_array_equal(anchors.index, golden[f"{prefix}anchor{number}/core_index"])
        np.testing.assert_allclose(anchors.offset, golden[f"{prefix}anchor{number}/offset"], rtol=CLOSE)


@pytest.mark.parametrize("case", ["a", "b_portrait", "c_sub4"])
def test_all_pixels_lift_to_the_reference_s_points_at_another_focal_length(
    golden: Mapping[str, Float64], case: str
) -> None:
    prefix = f"canon/{case}/"
    view = _view(golden, case)
    intrinsics, world_from_cam = golden[prefix + "dense/K"], golden[prefix + "dense/cam2w"]
    height, width = view.confidence.shape
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).reshape(-1, 2)
    anchors = view.anchors(pixels)
    relative = depth_at_focal(anchors.offset, np.array(view.focal_px / intrinsics[0, 0]))
    depth = view.anchor_depth.ravel()[anchors.index] * relative
    np.testing.assert_allclose(depth, golden[prefix + "dense/depth"].ravel(), rtol=CLOSE)
    rays = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1) @ np.linalg.inv(intrinsics).T
    points = (depth[:, None] * rays) @ world_from_cam[:3, :3].T + world_from_cam[:3, 3]
    np.testing.assert_allclose(points, golden[prefix + "dense/pts3d_world"].reshape(-1, 3), atol=3e-5, rtol=CLOSE)


@pytest.mark.parametrize("case", ["clean", "noisy", "outliers", "tiny_f", "huge_f", "zeros"])
@pytest.mark.parametrize("place", ["center", "shift"])
def test_focal_lengths_are_the_reference_s(golden: Mapping[str, Float64], case: str, place: str) -> None:
    points, prefix = golden[f"focal/{case}/pts3d"], f"focal/{case}/{place}/"
    centre = golden[prefix + "pp"]
    np.testing.assert_allclose(focal_of_pointmap(points, centre), golden[prefix + "weiszfeld_sfm"], rtol=CLOSE)
    if case != "outliers":  # not meaningful there, says the data's description
        free = focal_of_pointmap(points, centre, limited=False)
        np.testing.assert_allclose(free, golden[prefix + "weiszfeld_nolimit"], rtol=CLOSE)


def test_scores_are_the_reference_s(golden: Mapping[str, Float64]) -> None:
    maps = tuple(golden[f"score/{name}"] for name in ("C11", "C12", "C21", "C22"))
    score = score_pair((maps[0], maps[1], maps[2], maps[3]), golden["score/corres_conf"])
    expected = golden["score/result_confscore_sumconf_ncorres"]
    np.testing.assert_allclose((score.confidence, score.match_confidence, score.matches), expected, rtol=CLOSE)


PREPARED = {"0-1": (0, 1), "1-2": (1, 2), "2-0": (2, 0)}


@pytest.mark.parametrize("image", [0, 1, 2])
def test_a_whole_preparation_is_the_reference_s(golden: Mapping[str, Float64], image: int) -> None:
    out = f"prep/out/img{image}/"
    sums = CanonicalSums((40, 56), align_scales=False)
    for name, pair in PREPARED.items():
        if image in pair:
            side = "11" if pair[0] == image else "22"
            sums.add(golden[f"prep/in/{name}/X{side}"], golden[f"prep/in/{name}/C{side}"])
    view = sums.view(golden[out + "pp"])
    np.testing.assert_allclose(view.focal_px, golden[out + "focal"], rtol=CLOSE)
    np.testing.assert_allclose(view.anchor_depth, golden[out + "core_depth"], rtol=CLOSE)
    condensed: list[tuple[Float64, ...]] = []
    for name, pair in PREPARED.items():
        if image not in pair:
            continue
        side, partner = (1, pair[1]) if pair[0] == image else (2, pair[0])
        pixels = golden[f"prep/in/{name}/xy{side}"].astype(np.int64)
        anchors = view.anchors(pixels)
        stored = f"{out}with_im{partner}/"
        np.testing.assert_array_equal(pixels, golden[stored + "pixels"])
        np.testing.assert_array_equal(anchors.index, golden[stored + "idx"])
        np.testing.assert_allclose(anchors.offset, golden[stored + "offset"], rtol=CLOSE)
        condensed.append((pixels, anchors.index, anchors.offset))
    prefix = f"prep/condensed/anchors{image}/"
    np.testing.assert_array_equal(np.concatenate([one[0] for one in condensed]), golden[prefix + "uv1"][:, :2])
    np.testing.assert_array_equal(np.concatenate([one[1] for one in condensed]), golden[prefix + "idx"])
    np.testing.assert_allclose(np.concatenate([one[2] for one in condensed]), golden[prefix + "offset"], rtol=CLOSE)


def test_prepared_scores_are_the_numbers_of_matches(golden: Mapping[str, Float64]) -> None:
    for name, (first, second) in PREPARED.items():
        maps = tuple(golden[f"prep/in/{name}/C{side}"] for side in ("11", "21", "22", "12"))
        score = score_pair((maps[0], maps[1], maps[2], maps[3]), golden[f"prep/in/{name}/conf"])
        assert score.matches == golden["prep/out/pairwise_scores"][first, second]
