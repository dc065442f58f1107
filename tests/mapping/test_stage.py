"""The map stage: which pairs are trusted, and one model per part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from mast3r_sfm.colmap.mapper import MapperSettings
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.config import MapConfig
from mast3r_sfm.evaluation.pairs import measure_pairs
from mast3r_sfm.mapping.stage import MapInput, build_models, photo_scale, trusted_matches, write_matches
from mast3r_sfm.types import AlignmentResult, PairMatches, Verdict
from tests.exact import Listener, Scene, ring

SETTINGS = MapperSettings(config=MapConfig(), pixel_scale=1.0, threads=1, seed=0)


def part(scene: Scene, images: Sequence[int], edges: Sequence[int]) -> AlignmentResult:
    return AlignmentResult(
        images=np.array(images, np.int32),
        edges=np.array(edges, np.int32),
        cam_from_world=scene.poses[list(images)],
        residual_deg=np.zeros(len(images)),
        history=(0.0,),
        stop_reason="exact",
    )


def make_input(scene: Scene, pairs: Sequence[tuple[int, int]], parts: Sequence[AlignmentResult]) -> MapInput:
    return MapInput(
        names=[f"{image:02d}.jpg" for image in range(len(scene.poses))],
        rig=scene.rig(),
        matches=[scene.matches(*pair) for pair in pairs],
        parts=parts,
    )


def changed(given: MapInput, verdicts: dict[int, Verdict]) -> MapInput:
    none = np.zeros((0, 3))
    matches: list[PairMatches] = list(given.matches)
    for edge, verdict in verdicts.items():
        kept = {} if verdict.has_depth else {"points_first": none, "points_second": none}
        matches[edge] = replace(matches[edge], verdict=verdict, **kept)
    return replace(given, matches=matches)


def trusted(given: MapInput) -> list[tuple[int, int]]:
    return [(match.first, match.second) for match in trusted_matches(given)]


def build(given: MapInput, folder: Path, listener: Listener | None = None) -> list[ColmapModel]:
    write_matches(folder / "database.db", given, "SIMPLE_RADIAL")
    return build_models(folder / "database.db", given, SETTINGS, listener or Listener())


def worst_error(model: ColmapModel, scene: Scene) -> float:
    truth = {f"{image:02d}.jpg": pose for image, pose in enumerate(scene.poses)}
    return float(measure_pairs([model.cam_from_world], truth, sorted(model.cam_from_world)).error_deg.max())


def test_pairs_that_contradict_their_part_are_not_trusted() -> None:
    scene = ring(5, turn_deg=90)
    pairs = [(0, 1), (1, 2), (0, 2), (2, 3), (3, 4)]
    # The alignment dropped the pair (0, 2); image 4 stands in no part.
    given = make_input(scene, pairs, [part(scene, [0, 1, 2, 3], [0, 1, 3])])
    assert trusted(given) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    weak = changed(given, {0: Verdict.WEAK, 3: Verdict.TOO_FEW})
    assert trusted(weak) == [(1, 2), (3, 4)]


def test_turns_are_trusted_though_no_alignment_rests_on_them() -> None:
    scene = ring(3, turn_deg=60)
    given = make_input(scene, [(0, 1), (1, 2), (0, 2)], [part(scene, [0, 1, 2], [0, 1])])
    assert trusted(changed(given, {2: Verdict.PURE_ROTATION})) == [(0, 1), (1, 2), (0, 2)]


def test_without_parts_all_links_are_trusted() -> None:
    scene = ring(3, turn_deg=60)
    given = changed(make_input(scene, [(0, 1), (1, 2), (0, 2)], []), {1: Verdict.WEAK})
    assert trusted(given) == [(0, 1), (0, 2)]


def test_the_database_holds_the_trusted_pairs_only(tmp_path: Path) -> None:
    scene = ring(4, turn_deg=60, points=50)
    given = make_input(scene, list(combinations(range(4), 2)), [part(scene, range(4), [0, 1, 2, 4, 5])])
    write_matches(tmp_path / "database.db", given, "OPENCV")
    with pycolmap.Database.open(str(tmp_path / "database.db")) as database:
        assert database.num_verified_image_pairs() == 5
        assert not database.exists_matches(2, 3)  # the fourth pair is (1, 2)
        assert database.read_camera(1).model.name == "OPENCV"
        assert [image.name for image in database.read_all_images()] == list(given.names)


def test_each_part_becomes_a_model(tmp_path: Path) -> None:
    scene = ring(9, points=120)
    small, large = [0, 3, 6, 8], [1, 2, 4, 5, 7]
    pairs = [*combinations(large, 2), *combinations(small, 2)]
    given = make_input(scene, pairs, [part(scene, large, range(10)), part(scene, small, range(10, 16))])
    listener = Listener()
    models = build(given, tmp_path, listener)
    assert [list(model.cam_from_world) for model in models] == [
        [f"{image:02d}.jpg" for image in images] for images in (large, small)
    ]
    for model in models:
        assert worst_error(model, scene) < 0.05
    assert listener.started == [("map", 2, "model")]
    assert listener.steps == 2
    assert listener.warnings == []


def test_an_image_stands_in_one_model_only(tmp_path: Path) -> None:
    """The first part takes in the images of the second: their pairs say that they belong together."""
    scene = ring(6, turn_deg=100, points=150)
    pairs = list(combinations(range(6), 2))
    given = make_input(scene, pairs, [part(scene, range(4), range(15)), part(scene, [4, 5], [14])])
    (model,) = build(given, tmp_path)
    assert len(model.cam_from_world) == 6
    assert worst_error(model, scene) < 0.05


def test_points_of_chance_are_no_model(tmp_path: Path) -> None:
    scene = ring(4, turn_deg=60, points=150)
    given = make_input(scene, list(combinations(range(4), 2)), [part(scene, range(4), range(6))])
    rng = np.random.default_rng(0)
    scattered = [
        replace(match, xy_second=rng.uniform([0, 0], [640, 480], match.xy_second.shape)) for match in given.matches
    ]
    assert build(replace(given, matches=scattered), tmp_path) == []


def test_a_model_of_few_points_is_none(tmp_path: Path) -> None:
    scene = ring(4, turn_deg=60, points=19)
    given = make_input(scene, list(combinations(range(4), 2)), [part(scene, range(4), range(6))])
    assert build(given, tmp_path) == []


def test_a_model_that_explains_little_is_said_to_be_doubtful(tmp_path: Path) -> None:
    scene = ring(5, turn_deg=90, points=300)
    given = make_input(scene, list(combinations(range(5), 2)), [part(scene, range(5), range(10))])
    rng = np.random.default_rng(0)
    matches = []
    for match in given.matches:
        xy_first, xy_second = match.xy_first.copy(), match.xy_second.copy()
        # Three of four matches are chance, at pixels of their own.
        xy_first[75:] = rng.uniform([0, 0], [640, 480], xy_first[75:].shape)
        xy_second[75:] = rng.uniform([0, 0], [640, 480], xy_second[75:].shape)
        matches.append(replace(match, xy_first=xy_first, xy_second=xy_second))
    listener = Listener()
    models = build(replace(given, matches=matches), tmp_path, listener)
    # 75 true keypoints beside 4 · 225 of chance are below the share that a model must explain at all.
    assert models == []
    fewer = [
        replace(
            match,
            **{
                name: getattr(match, name)[: 75 + 75]
                for name in ("xy_first", "xy_second", "confidence", "points_first", "points_second")
            },
        )
        for match in matches
    ]
    (model,) = build(replace(given, matches=fewer), tmp_path, listener)
    assert 0.1 <= model.observed_share < 0.3
    assert worst_error(model, scene) < 0.1
    assert len(listener.warnings) == 1
    assert "00.jpg and 4 more photos" in listener.warnings[0]


@pytest.mark.parametrize(("scales", "expected"), [([2.0], 2.0), ([1.0, 4.0, 3.0], 3.0)])
def test_the_scale_of_a_collection_is_the_median(scales: list[float], expected: float) -> None:
    assert photo_scale(scales) == expected
