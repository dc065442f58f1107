"""What is said of how well images are held."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm import image_summaries as module
from mast3r_sfm.image_summaries import summarise_images
from mast3r_sfm.mapping.stage import MapInput
from mast3r_sfm.types import AlignmentResult
from tests.exact import ring
from tests.mapping.test_stage import build, make_input, part

FIELDS = ("xy_first", "xy_second", "confidence", "points_first", "points_second")


@pytest.fixture
def given() -> MapInput:
    """Seven images that see 200 points with 0.4 px of noise; the third sees 20 of them only."""
    scene = ring(7, turn_deg=120, points=200)
    scene = replace(scene, points=0.8 * scene.points)
    errors = 0.4 * np.random.default_rng(1).normal(size=(7, 200, 2))
    pairs = list(combinations(range(7), 2))
    matches = []
    for i, j in pairs:
        match = scene.matches(i, j)
        some = slice(0, 20 if 2 in (i, j) else 200)
        moved = replace(match, xy_first=match.xy_first + errors[i], xy_second=match.xy_second + errors[j])
        matches.append(replace(moved, **{name: getattr(moved, name)[some] for name in FIELDS}))
    aligned = replace(
        part(scene, range(7), range(21)),
        num_edges=np.array([6, 6, 2, 6, 1, 6, 6], np.int32),
        residual_deg=np.linspace(0, 0.6, 7),
    )
    return replace(make_input(scene, pairs, [aligned]), matches=matches)


def test_figures_of_every_image(given: MapInput, tmp_path: Path) -> None:
    (model,) = build(given, tmp_path)
    found = summarise_images(model, given.parts, given.names)
    assert [image.name for image in found] == list(given.names) == list(model.cam_from_world)
    assert [image.edges for image in found] == [6, 6, 2, 6, 1, 6, 6]
    assert [image.residual_deg for image in found] == pytest.approx(np.linspace(0, 0.6, 7))
    assert [image.observations for image in found] == np.bincount(model.tracks().image).tolist()
    assert found[2].observations <= 20
    for image in found:
        # Of two Gaussian coordinates, sqrt(π/2) times the noise, less what the fit takes up.
        assert 0.3 < image.mean_error_px < 0.55
        assert image.rotation_sigma_deg is not None
        assert image.position_sigma is not None
        assert 0.005 < image.rotation_sigma_deg < 0.3
        assert 1e-4 < image.position_sigma < 0.01
    weight = [image.observations for image in found]
    assert np.average([image.mean_error_px for image in found], weights=weight) == pytest.approx(
        model.summary("").mean_reprojection_error_px, rel=0.02
    )


def test_weak_images_are_named_with_the_reason(
    given: MapInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = build(given, tmp_path)
    found = summarise_images(model, given.parts, given.names)
    assert [bool(image.weak) for image in found] == [False, False, True, False, True, False, False]
    assert found[2].weak.startswith(f"{found[2].observations} points")
    assert found[4].weak == "one pair"
    monkeypatch.setattr(module, "WEAK_SIGMA", 1.5)
    worse = summarise_images(model, given.parts, given.names)[2]
    assert f"rotation ±{worse.rotation_sigma_deg:.2g}°" in worse.weak
    assert f"position ±{100 * (worse.position_sigma or 0):.2g} %" in worse.weak
    monkeypatch.setattr(module, "WEAK_POSITION", 1e-5)
    assert all("position" in image.weak for image in summarise_images(model, given.parts, given.names))


def test_what_is_not_known_is_not_said(given: MapInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that were registered later stand in no part, and large models have no covariance."""
    (model,) = build(given, tmp_path)
    monkeypatch.setattr(module, "pose_sigmas", lambda _: None)
    whole = given.parts[0]
    few = AlignmentResult(
        images=whole.images[:5],
        edges=whole.edges,
        cam_from_world=whole.cam_from_world[:5],
        residual_deg=whole.residual_deg[:5],
        history=(),
        stop_reason="",
        num_edges=whole.num_edges[:5],
    )
    found = summarise_images(model, [few], given.names)
    assert [image.edges for image in found] == [6, 6, 2, 6, 1, 0, 0]
    assert [image.residual_deg is None for image in found] == [False] * 5 + [True] * 2
    assert all(image.rotation_sigma_deg is None and image.position_sigma is None for image in found)
    assert [bool(image.weak) for image in found] == [False, False, True, False, True, False, False]
