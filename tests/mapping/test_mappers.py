"""The map stage with COLMAP's own mappers: the same rules as for ours, and the same refinement."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.colmap.mapper import Mapper
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.config import Config
from mast3r_sfm.mapping import stage
from mast3r_sfm.mapping.stage import MapInput, build_models, write_matches
from tests.exact import Listener, ring
from tests.mapping.test_stage import (
    SETTINGS,
    Knowing,
    assert_database_agrees,
    build_refined,
    make_input,
    noisy_input,
    part,
    two_clusters,
    worst_error,
)

KINDS = ["global", "incremental"]


def build(
    given: MapInput, folder: Path, kind: str, refiner: Knowing | None = None, listener: Listener | None = None
) -> list[ColmapModel]:
    settings = replace(SETTINGS, config=Config().with_overrides([f"map.mapper={kind}"]).map)
    write_matches(folder / "database.db", given, settings)
    return build_models(folder / "database.db", given, settings, listener or Listener(), refiner)


@pytest.mark.parametrize("kind", KINDS)
def test_each_place_becomes_a_model(tmp_path: Path, kind: str) -> None:
    scene = ring(9, points=120)
    small, large = [0, 3, 6, 8], [1, 2, 4, 5, 7]
    pairs = [*combinations(large, 2), *combinations(small, 2)]
    given = make_input(scene, pairs, [part(scene, large, range(10)), part(scene, small, range(10, 16))])
    listener = Listener()
    models = build(given, tmp_path, kind, listener=listener)
    assert [sorted(model.names()) for model in models] == [large, small]
    for model in models:
        assert worst_error(model, scene) < 0.05
    assert (listener.started, listener.steps, listener.warnings) == ([("map", 1, "model")], 1, [])


@pytest.mark.parametrize("kind", KINDS)
def test_their_models_are_refined_as_ours_are(tmp_path: Path, kind: str) -> None:
    scene = ring(6, turn_deg=100, points=250)
    given, refiner = noisy_input(scene, [range(6)])
    (raw,) = build(given, tmp_path, kind)
    (refined,) = build(given, tmp_path, kind, refiner)
    assert len(refiner.calls) == 1
    assert 0.05 < worst_error(raw, scene) < 0.6
    assert worst_error(refined, scene) < 0.01
    assert_database_agrees(tmp_path, [refined])


@pytest.mark.parametrize("kind", KINDS)
def test_points_of_chance_are_no_model(tmp_path: Path, kind: str) -> None:
    given = make_input(ring(4, turn_deg=60, points=19), list(combinations(range(4), 2)), [])
    assert build(given, tmp_path, kind) == []


def test_an_image_stands_in_one_model_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COLMAP's incremental mapper lets models overlap; what the first has taken is taken from the second."""
    scene = ring(6, turn_deg=100, points=250)
    given = make_input(scene, list(combinations(range(6), 2)), [part(scene, range(6), range(15))])
    (whole,) = build(given, tmp_path, "incremental")
    overlapping = [whole.restricted_to(range(4)), whole.restricted_to([2, 3, 4, 5])]
    monkeypatch.setattr(stage, "colmap_models", lambda *_: overlapping)
    models = build(given, tmp_path, "incremental")
    assert [sorted(model.names()) for model in models] == [[0, 1, 2, 3], [4, 5]]
    monkeypatch.setattr(stage, "colmap_models", lambda *_: [overlapping[0], whole.restricted_to([1, 2, 3, 4])])
    assert [sorted(model.names()) for model in build(given, tmp_path, "incremental")] == [[0, 1, 2, 3]]


def test_what_next_to_nothing_holds_together_is_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, given = two_clusters(60)
    (whole,) = build(given, tmp_path, "incremental")
    monkeypatch.setattr(stage, "MIN_SHARED", 100)
    models = build(given, tmp_path, "incremental")
    groups = [sorted(model.names()) for model in models]
    assert len(groups) == 2
    assert sorted(groups[0] + groups[1]) == sorted(whole.names())


def test_a_model_that_refinement_ruins_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last adjustment leaves no image, as where a focal length runs away."""

    class Ruining(Mapper):
        def readjust(self, model: ColmapModel, *, settle: bool = True) -> ColmapModel:
            return model.restricted_to([]) if settle else super().readjust(model, settle=settle)

    scene = ring(5, turn_deg=100, points=200)
    given, refiner = noisy_input(scene, [range(5)])
    (raw,) = build_refined(given, tmp_path, None)
    monkeypatch.setattr(stage, "Mapper", Ruining)
    (model,) = build_refined(given, tmp_path, refiner)
    assert len(refiner.calls) == 1
    for image, pose in raw.poses().items():
        np.testing.assert_array_equal(model.poses()[image], pose)
