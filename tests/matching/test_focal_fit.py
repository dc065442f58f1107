"""Focal lengths by how well relative poses explain the matches."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.matching import focal_fit
from mast3r_sfm.matching.check import EpipolarEdge, check_pair
from mast3r_sfm.matching.focal_fit import LAST_STEP, MAX_MATCHES, TYPICAL_RATIO, fit_focal_ratios
from mast3r_sfm.types import Bool, Float64, Int32
from tests.exact import CENTRE_PX, HEIGHT_PX, WIDTH_PX, Scene, ring, turning, wall, wandering

CONFIG = MatchConfig()


def zoomed(scene: Scene, focal_px: Float64, noise_px: float = 0.5, outliers: float = 0.3) -> list[EpipolarEdge]:
    """All pairs, photographed with another focal length per image."""
    edges = []
    for first, second in combinations(range(len(scene.poses)), 2):
        putative, _ = scene.putative(first, second, noise_px=noise_px, outliers=outliers)
        xy = [
            (places - CENTRE_PX) * focal_px[image] / scene.focal_px + CENTRE_PX
            for image, places in ((first, putative.xy_first), (second, putative.xy_second))
        ]
        edges.append(check_pair((first, second), replace(putative, xy_first=xy[0], xy_second=xy[1]), CONFIG, 0))
    return edges


def fit(
    edges: list[EpipolarEdge], camera: Int32, start: Float64, unknown: Bool | None = None, threads: int = 1
) -> Float64:
    sizes = np.tile([float(WIDTH_PX), float(HEIGHT_PX)], (len(camera), 1))
    free = np.ones(len(start), np.bool_) if unknown is None else unknown
    return fit_focal_ratios(edges, camera, sizes, sizes / 2, start, free, threads)


@pytest.mark.parametrize("focal_px", [400.0, 600.0, 1100.0])
@pytest.mark.parametrize("start", [0.4, 1.0, 3.0])
def test_a_shared_focal_length_is_found_from_anywhere(focal_px: float, start: float) -> None:
    edges = zoomed(ring(5, turn_deg=100, points=120), np.full(5, focal_px))
    found = fit(edges, np.zeros(5, np.int32), np.array([start]))
    assert WIDTH_PX * found[0] == pytest.approx(focal_px, rel=LAST_STEP - 1 + 0.02)


def test_wrong_fundamental_matrices_do_not_matter() -> None:
    """It rests on the matches, those that the fundamental matrix was wrong to reject among them."""
    scene = ring(5, turn_deg=100, points=120)
    edges, other = zoomed(scene, np.full(5, 600.0)), np.random.default_rng(0)
    for number, edge in enumerate(edges):
        kept = other.random(len(edge.xy_first)) < 0.3
        lost = edge.is_distinct & ~kept
        columns = [edge.xy_first[lost], edge.xy_second[lost], edge.confidence[lost, None]]
        edges[number] = replace(
            edge,
            fundamental=other.normal(size=(3, 3)),
            xy_first=edge.xy_first[kept],
            xy_second=edge.xy_second[kept],
            confidence=edge.confidence[kept],
            is_distinct=edge.is_distinct[kept],
            rejected=np.concatenate([edge.rejected, np.concatenate(columns, axis=1).astype(np.float32)]),
        )
    found = fit(edges, np.zeros(5, np.int32), np.array([2.0]))
    assert WIDTH_PX * found[0] == pytest.approx(600, rel=0.06)


@pytest.mark.parametrize("seed", range(3))
def test_cameras_of_their_own(seed: int) -> None:
    focal_px = np.array([450.0, 800.0, 550.0, 700.0, 600.0, 500.0])
    edges = zoomed(wandering(6, seed), focal_px, noise_px=0.2)
    found = fit(edges, np.arange(6, dtype=np.int32), np.ones(6))
    assert np.median(np.abs(np.log(WIDTH_PX * found / focal_px))) < 0.08


def test_known_ones_stay_and_help() -> None:
    focal_px = np.array([450.0, 800.0])
    camera = np.arange(6, dtype=np.int32) % 2
    edges = zoomed(ring(6, turn_deg=140, points=150), focal_px[camera])
    known = np.array([450 / WIDTH_PX, 1.0])
    found = fit(edges, camera, known, np.array([False, True]))
    assert found[0] == known[0]
    assert WIDTH_PX * found[1] == pytest.approx(800, rel=0.06)
    np.testing.assert_array_equal(fit(edges, camera, known, np.zeros(2, np.bool_)), known)
    np.testing.assert_array_equal(fit([], camera, known), known)


def test_threads_change_nothing() -> None:
    edges = zoomed(ring(5, turn_deg=100, points=120), np.full(5, 700.0))
    camera, start = np.arange(5, dtype=np.int32), np.full(5, 1.5)
    np.testing.assert_array_equal(fit(edges, camera, start), fit(edges, camera, start, threads=3))


def test_where_the_pairs_say_nothing_it_stays_usual() -> None:
    """One plane seen straight on from two places."""
    scene = wall(2, points=MAX_MATCHES)
    scene = replace(scene, poses=np.stack([scene.poses[0], scene.poses[0]]))
    scene.poses[1, 0, 3] += 0.5
    found = fit(zoomed(scene, np.full(2, 600.0), outliers=0.0), np.zeros(2, np.int32), np.array([3.5]))
    assert found[0] == pytest.approx(TYPICAL_RATIO, rel=0.2)


@pytest.mark.parametrize("focal_px", [480.0, 900.0])
def test_a_turning_camera_tells_it_too(focal_px: float) -> None:
    found = fit(zoomed(turning(4), np.full(4, focal_px), outliers=0.0), np.zeros(4, np.int32), np.array([2.0]))
    assert WIDTH_PX * found[0] == pytest.approx(focal_px, rel=0.1)


def test_many_unknown_cameras_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = zoomed(ring(4, turn_deg=100, points=120), np.full(4, 700.0))
    camera, start = np.arange(4, dtype=np.int32), np.full(4, 2.5)
    assert (fit(edges, camera, start) < 2).all()
    monkeypatch.setattr(focal_fit, "MAX_CAMERAS", 3)
    np.testing.assert_array_equal(fit(edges, camera, start), start)
