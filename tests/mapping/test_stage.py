"""The map stage: which pairs are trusted, and one model per part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pycolmap
import pytest
from scipy.spatial import cKDTree

from mast3r_sfm.colmap.mapper import Mapper, MapperSettings
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.config import MapConfig
from mast3r_sfm.evaluation.pairs import measure_pairs
from mast3r_sfm.geometry.rigid import compose_poses, make_pose, rotation_from_axis_angle
from mast3r_sfm.mapping import stage
from mast3r_sfm.mapping.refinement import Geometry, Refined, Refiner
from mast3r_sfm.mapping.stage import (
    MIN_CONFIRMED,
    MIN_REFINED_PX,
    MIN_SHARED,
    MapInput,
    build_models,
    photo_scale,
    trusted_matches,
    write_matches,
)
from mast3r_sfm.types import AlignmentResult, Float32, Float64, PairMatches, Tracks, Verdict
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
    write_matches(folder / "database.db", given, SETTINGS)
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
    write_matches(tmp_path / "database.db", given, replace(SETTINGS, config=MapConfig(camera_model="OPENCV")))
    with pycolmap.Database.open(str(tmp_path / "database.db")) as database:
        assert database.num_verified_image_pairs() == 5
        assert not database.exists_matches(2, 3)  # the fourth pair is (1, 2)
        assert database.read_camera(1).model.name == "OPENCV"
        assert [image.name for image in database.read_all_images()] == list(given.names)


@pytest.mark.parametrize(("pixel_scale", "joined"), [(1.0, False), (2.0, True)])
def test_keypoints_are_one_within_a_pixel_of_matching(tmp_path: Path, pixel_scale: float, joined: bool) -> None:
    scene = spread(ring(3, turn_deg=60, points=60))
    given = make_input(scene, [(0, 1), (0, 2)], [part(scene, range(3), [0, 1])])
    one, two = given.matches
    aside = replace(two, xy_first=two.xy_first + np.array([0.9, 1.2]))
    settings = replace(SETTINGS, pixel_scale=pixel_scale)
    write_matches(tmp_path / "database.db", replace(given, matches=[one, aside]), settings)
    with pycolmap.Database.open(str(tmp_path / "database.db")) as database:
        stored = np.asarray(database.read_keypoints(1))[:, :2]
    assert len(stored) == (1 if joined else 2) * len(one)
    if joined:
        middle = one.xy_first + np.array([0.45, 0.6])
        assert cKDTree(stored).query(middle)[0].max() < 1e-3


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


def test_a_part_that_would_take_in_an_image_of_another_stays_without_it(tmp_path: Path) -> None:
    """The last image of the first part sees many points of the second, which the others of the first do not see."""
    scene = ring(9, turn_deg=200, points=300)
    scene = replace(scene, points=0.8 * scene.points)
    matches = []
    for i, j in combinations(range(9), 2):
        match = scene.matches(i, j)
        assert len(match) == 300
        rows = np.arange(300) < 150 if j < 5 else np.arange(300) >= 150 if i >= 4 else np.zeros(300, bool)
        values = {
            name: getattr(match, name)[rows]
            for name in ("xy_first", "xy_second", "confidence", "points_first", "points_second")
        }
        matches.append(replace(match, **values))
    parts = [part(scene, range(5), range(36)), part(scene, [5, 6, 7, 8], range(36))]
    given = replace(make_input(scene, list(combinations(range(9), 2)), parts), matches=matches)
    models = build(given, tmp_path)
    assert [list(model.cam_from_world) for model in models] == [list(given.names[:5]), list(given.names[5:])]
    for model in models:
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


@dataclass(frozen=True, kw_only=True)
class Knowing(Refiner):
    """A refiner that knows where the keypoints [N, K, 2] should be [N, K, 2], and rejects all of some images."""

    noisy: Float64
    true: Float64
    rejected: tuple[int, ...] = ()
    """Images."""
    spared: int = 0
    """Observations of these that are kept all the same."""
    finds: bool = True
    """Whether what an image does not show yet is found in it."""
    completes: bool = False
    """Whether what was rejected aligns when it is tried again."""
    calls: list[Tracks] = field(default_factory=list)
    extensions: list[Tracks] = field(default_factory=list)

    def refine(self, tracks: Tracks, geometry: Geometry) -> Refined:
        assert isinstance(geometry, ColmapModel)
        self.calls.append(tracks)
        xy, kept = tracks.xy.copy(), ~np.isin(tracks.image, self.rejected)
        for image in np.unique(tracks.image).tolist():
            mine = np.flatnonzero(tracks.image == image)
            xy[mine] = self.true[image][cKDTree(self.noisy[image]).query(tracks.xy[mine])[1]]
            kept[mine[: self.spared]] = True
        return Refined(xy=xy, kept=kept)

    def complete(self, tracks: Tracks, geometry: Geometry, lost: Tracks) -> Tracks:
        assert isinstance(geometry, ColmapModel)
        assert len(lost.points) == len(tracks.points)
        xy = lost.xy.copy()
        for image in np.unique(lost.image).tolist():
            mine = np.flatnonzero(lost.image == image)
            xy[mine] = self.true[image][cKDTree(self.noisy[image]).query(lost.xy[mine])[1]]
        rows = np.flatnonzero(np.full(len(xy), self.completes))
        return Tracks(
            points=lost.points,
            point=lost.point[rows],
            image=lost.image[rows],
            keypoint=lost.keypoint[rows],
            xy=xy[rows],
        )

    def extend(self, tracks: Tracks, geometry: Geometry) -> Tracks:
        assert isinstance(geometry, ColmapModel)
        self.extensions.append(tracks)
        there = set(zip(tracks.point.tolist(), tracks.image.tolist(), strict=True))
        first = np.unique(tracks.point, return_index=True)[1]
        rows = []
        for point, row in enumerate(first.tolist()):
            meant = int(cKDTree(self.true[tracks.image[row]]).query(tracks.xy[row])[1])
            for image in np.unique(tracks.image).tolist():
                if self.finds and (point, image) not in there:
                    rows.append((point, image, *self.true[image, meant]))
        table = np.array(rows).reshape(-1, 4)
        return Tracks(
            points=tracks.points,
            point=table[:, 0].astype(np.int64),
            image=table[:, 1].astype(np.int64),
            keypoint=np.full(len(table), -1),
            xy=table[:, 2:],
        )


def no_photo(image: int) -> Float32:
    raise AssertionError(f"photo {image} was read")


def spread(scene: Scene) -> Scene:
    """Without points that come near another in some image, so that each pixel tells its point."""
    views = [cKDTree(scene.project(image)) for image in range(len(scene.poses))]
    crowded = {point for view in views for both in view.query_pairs(4) for point in both}
    return replace(scene, points=np.delete(scene.points, sorted(crowded), axis=0))


def noisy_input(
    scene: Scene, parts: Sequence[Sequence[int]], *, scale: float = 1.0, **knowing: Any
) -> tuple[MapInput, Knowing]:
    """Parts whose keypoints have 0.7 px of noise, and what knows the truth; all in photos `scale` times as large."""
    number, scene = len(scene.poses), spread(scene)
    true = scale * np.stack([scene.project(image) for image in range(number)])
    noisy = true + 0.7 * scale * np.random.default_rng(3).normal(size=true.shape)
    pairs = [pair for images in parts for pair in combinations(images, 2)]
    ends = np.cumsum([len(images) * (len(images) - 1) // 2 for images in parts])
    given = make_input(
        scene,
        pairs,
        [
            part(scene, images, range(end - len(images) * (len(images) - 1) // 2, end))
            for images, end in zip(parts, ends.tolist(), strict=True)
        ],
    )
    matches = []
    for match in given.matches:
        seen = scene.sees(match.first) & scene.sees(match.second)
        matches.append(replace(match, xy_first=noisy[match.first][seen], xy_second=noisy[match.second][seen]))
    refiner = Knowing(load_grey=no_photo, pixel_scale=1.0, threads=1, noisy=noisy, true=true, **knowing)
    return replace(given, matches=matches, rig=scene.rig(photo_scale=scale)), refiner


def build_refined(given: MapInput, folder: Path, refiner: Refiner | None, scale: float = 1.0) -> list[ColmapModel]:
    settings = replace(SETTINGS, pixel_scale=scale)
    write_matches(folder / "database.db", given, settings)
    return build_models(folder / "database.db", given, settings, Listener(), refiner)


def assert_database_agrees(folder: Path, models: Sequence[ColmapModel]) -> None:
    """Images, in one model or another, have the keypoints that the database has."""
    with pycolmap.Database.open(str(folder / "database.db")) as database:
        for model in models:
            for image, xy in model.keypoints().items():
                stored = np.asarray(database.read_keypoints(image + 1))[:, :2]
                np.testing.assert_array_equal(stored, xy.astype(np.float32))


def test_models_are_adjusted_to_refined_observations(tmp_path: Path) -> None:
    scene = ring(9, points=150)
    parts = [[1, 2, 4, 5, 7], [0, 3, 6, 8]]
    given, refiner = noisy_input(scene, parts)
    plain = build_refined(given, tmp_path, None)
    assert_database_agrees(tmp_path, plain)
    refined = build_refined(given, tmp_path, refiner)
    assert_database_agrees(tmp_path, refined)
    assert [list(model.cam_from_world) for model in refined] == [list(model.cam_from_world) for model in plain]
    for before, after in zip(plain, refined, strict=True):
        assert worst_error(before, scene) > 0.1
        assert worst_error(after, scene) < 0.01
        assert before.summary("").mean_reprojection_error_px > 0.5
        assert after.summary("").mean_reprojection_error_px < 0.01
        assert after.num_points == before.num_points
    assert sorted(np.unique(tracks.image).tolist() for tracks in refiner.calls) == sorted(
        sorted(part) for part in parts
    )


@pytest.mark.parametrize(
    ("rejected", "spared"), [((2,), 0), ((2,), 5), ((0, 1, 2, 3), 0)], ids=["an image", "most of one", "all"]
)
def test_where_refined_observations_do_not_hold_an_image_all_stays(
    tmp_path: Path, rejected: tuple[int, ...], spared: int
) -> None:
    scene = ring(4, turn_deg=80, points=100)
    given, refiner = noisy_input(scene, [range(4)], rejected=rejected, spared=spared)
    (plain,) = build_refined(given, tmp_path, None)
    (refined,) = build_refined(given, tmp_path, refiner)
    assert len(refiner.calls) == 1
    assert refiner.extensions == []
    for name, pose in plain.cam_from_world.items():
        np.testing.assert_array_equal(pose, refined.cam_from_world[name])
    assert plain.summary("") == refined.summary("")
    assert_database_agrees(tmp_path, [refined])


def test_where_further_observations_do_not_hold_an_image_those_before_them_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, refiner = noisy_input(ring(4, turn_deg=80, points=160), [range(4)])
    readjust, results = Mapper.readjust, []

    def losing(self: Mapper, model: ColmapModel, *, settle: bool = True) -> ColmapModel:
        """The second adjustment loses an image."""
        results.append(readjust(self, model, settle=settle))
        if len(results) == 2:
            tracks = results[1].tracks()
            return results[1].moved(tracks, tracks.xy, tracks.image != 2)
        return results[-1]

    monkeypatch.setattr(Mapper, "readjust", losing)
    (refined,) = build_refined(given, tmp_path, refiner)
    assert len(results) == 3
    assert refined is results[2]
    assert refined.cam_from_world.keys() == results[0].cam_from_world.keys()
    assert_database_agrees(tmp_path, [refined])


@pytest.mark.parametrize("finds", [False, True])
def test_an_image_may_lose_many_of_its_observations(tmp_path: Path, finds: bool) -> None:
    """And gets them back, where the refiner finds them; they are new keypoints then."""
    scene = ring(4, turn_deg=80, points=160)
    given, refiner = noisy_input(scene, [range(4)], rejected=(2,), spared=25, finds=finds)
    (plain,) = build_refined(given, tmp_path, None)
    (refined,) = build_refined(given, tmp_path, refiner)
    assert worst_error(refined, scene) < 0.01
    count = np.bincount(refined.tracks().image)
    assert count[2] == (count[0] if finds else 25)
    assert count[0] > 95
    assert_database_agrees(tmp_path, [refined])
    (seen,) = refiner.extensions
    before = np.bincount(seen.image)
    assert before[2] == 25
    # All that is new is a keypoint more.
    for image, xy in refined.keypoints().items():
        assert len(xy) - len(plain.keypoints()[image]) == count[image] - before[image]


@pytest.mark.parametrize("detected", [True, False])
def test_tracks_of_a_dense_model_get_back_the_keypoints_that_they_lost(tmp_path: Path, detected: bool) -> None:
    """Where these align at last. Detected keypoints are not asked for again."""
    scene = ring(4, turn_deg=80, points=160)
    given, refiner = noisy_input(scene, [range(4)], rejected=(2,), spared=25, finds=False, completes=True)
    given = replace(given, detected=detected)
    (plain,) = build_refined(given, tmp_path, None)
    (refined,) = build_refined(given, tmp_path, refiner)
    before, after = plain.tracks(), refined.tracks()
    if detected:
        assert (after.image == 2).sum() == 25
        return
    assert refined.num_points == plain.num_points
    assert (before.image == 2).sum() > 95
    for image in range(4):
        assert set(after.keypoint[after.image == image]) == set(before.keypoint[before.image == image])
        assert len(refined.keypoints()[image]) == len(plain.keypoints()[image])
    assert worst_error(refined, scene) < 0.01
    assert refined.summary("").mean_reprojection_error_px < 0.01
    assert_database_agrees(tmp_path, [refined])


def test_further_observations_are_adjusted_to(tmp_path: Path) -> None:
    """Those that are wrong are dropped again, and the true ones of the same points stay."""
    scene = ring(4, turn_deg=80, points=160)
    given, knowing = noisy_input(scene, [range(4)], rejected=(2,), spared=25)

    class Misled(Knowing):
        def extend(self, tracks: Tracks, geometry: Geometry) -> Tracks:
            found = super().extend(tracks, geometry)
            wrong = np.arange(len(found.point)) % 3 == 0
            return replace(found, xy=found.xy + np.where(wrong[:, None], 15.0, 0.0))

    (refined,) = build_refined(given, tmp_path, Misled(**vars(knowing)))
    assert worst_error(refined, scene) < 0.01
    tracks = refined.tracks()
    mine = tracks.image == 2
    lost = np.bincount(tracks.image)[0] - 25
    assert 25 + 0.6 * lost < mine.sum() <= 25 + np.ceil(2 / 3 * lost)
    assert cKDTree(knowing.true[2]).query(tracks.xy[mine])[0].max() < 1e-6
    assert np.bincount(tracks.image)[0] > 95


@pytest.mark.parametrize("large_enough", [True, False])
def test_small_photos_are_not_refined(tmp_path: Path, large_enough: bool) -> None:
    scene = ring(4, turn_deg=80, points=100)
    scale = (MIN_REFINED_PX - (0 if large_enough else 1)) / 640
    given, refiner = noisy_input(scene, [range(4)], scale=scale)
    (model,) = build_refined(given, tmp_path, refiner, scale)
    assert len(refiner.calls) == large_enough
    assert (worst_error(model, scene) < 0.02) == large_enough


@pytest.mark.parametrize(("spared", "stays"), [(MIN_SHARED - 3, False), (MIN_SHARED + 3, True)])
def test_what_refinement_leaves_hanging_by_next_to_nothing_goes(tmp_path: Path, spared: int, stays: bool) -> None:
    scene = ring(5, turn_deg=100, points=160)
    given, refiner = noisy_input(scene, [range(5)], rejected=(2,), spared=spared, finds=False)
    (refined,) = build_refined(given, tmp_path, refiner)
    assert sorted(refined.poses()) == [0, 1, *([2] if stays else []), 3, 4]
    assert worst_error(refined, scene) < 0.02
    assert_database_agrees(tmp_path, [refined])


def test_what_is_no_model_is_not_refined(tmp_path: Path) -> None:
    given, refiner = noisy_input(ring(4, turn_deg=60, points=19), [range(4)])
    assert build_refined(given, tmp_path, refiner) == []
    assert refiner.calls == []


def two_clusters(shared: int, *, seed: int = 0) -> tuple[Scene, MapInput]:
    """Two groups of four images, each with 120 points of its own, of one part; all images see `shared` more points."""
    scene = ring(8, turn_deg=200, points=240 + shared, seed=seed)
    scene = replace(scene, points=0.8 * scene.points)
    group = np.arange(8) // 4
    rng = np.random.default_rng(seed)
    matches = []
    for i, j in combinations(range(8), 2):
        match = scene.matches(i, j)
        assert len(match) == len(scene.points)
        number = np.arange(len(match))
        common = number >= 240
        rows = common | (number // 120 == group[i]) if group[i] == group[j] else common
        values = {
            name: getattr(match, name)[rows]
            for name in ("xy_first", "xy_second", "confidence", "points_first", "points_second")
        }
        matches.append(replace(match, **values))
    given = MapInput(
        names=[f"{image:02d}.jpg" for image in range(8)],
        rig=scene.rig(),
        matches=matches,
        parts=[part(scene, rng.permutation(8).tolist(), range(28))],
    )
    return scene, given


@pytest.mark.parametrize("shared", [0, 5, MIN_SHARED - 1, MIN_SHARED + 3, 60])
def test_what_next_to_nothing_holds_together_is_taken_apart(tmp_path: Path, shared: int) -> None:
    scene, given = two_clusters(shared)
    models = build(given, tmp_path)
    names = [list(model.cam_from_world) for model in models]
    if shared > MIN_SHARED:
        assert names == [list(given.names)]
    else:
        assert sorted(names) == [list(given.names[:4]), list(given.names[4:])]
    for model in models:
        assert worst_error(model, scene) < 0.05
        assert model.num_points >= 120
        assert len(model.groups(MIN_SHARED)) == 1


@pytest.mark.parametrize(("shared", "holds"), [(MIN_CONFIRMED - 4, False), (MIN_CONFIRMED + 4, True)])
def test_pairs_that_confirmed_each_other_hold_groups_by_fewer_points(tmp_path: Path, shared: int, holds: bool) -> None:
    scene, given = two_clusters(shared)
    models = build(replace(given, confirmed=frozenset({(1, 5), (2, 6)})), tmp_path)
    assert [len(model.cam_from_world) for model in models] == ([8] if holds else [4, 4])
    for model in models:
        assert worst_error(model, scene) < 0.05


def test_where_groups_stand_wrong_to_each_other_each_is_right_by_itself(tmp_path: Path) -> None:
    scene, given = two_clusters(6)
    (whole,) = given.parts
    poses = whole.cam_from_world.copy()
    second = whole.images >= 4
    turn = make_pose(rotation_from_axis_angle(np.array([0.0, 0.4, 0.0])), np.array([1.5, 0.0, 0.5]))
    poses[second] = [compose_poses(pose, turn) for pose in poses[second]]
    models = build(replace(given, parts=[replace(whole, cam_from_world=poses)]), tmp_path)
    assert sorted(list(model.cam_from_world) for model in models) == [list(given.names[:4]), list(given.names[4:])]
    for model in models:
        assert worst_error(model, scene) < 0.05


def test_an_image_alone_is_no_model(tmp_path: Path) -> None:
    """One that hangs on a few points is left out, and the others stay together."""
    scene = ring(5, turn_deg=80, points=150)
    matches = []
    for pair in combinations(range(5), 2):
        match = scene.matches(*pair)
        count = 12 if 4 in pair else len(match)
        values = {
            name: getattr(match, name)[:count]
            for name in ("xy_first", "xy_second", "confidence", "points_first", "points_second")
        }
        matches.append(replace(match, **values))
    given = make_input(scene, list(combinations(range(5), 2)), [part(scene, range(5), range(10))])
    (model,) = build(replace(given, matches=matches), tmp_path)
    assert list(model.cam_from_world) == list(given.names[:4])
    assert worst_error(model, scene) < 0.05


class Falling(Mapper):
    """Builds models that always fall into the first image and the others, whatever they are built from."""

    built: ClassVar[list[tuple[list[int], bool]]] = []

    def build(self, poses: Mapping[int, Float64], *, grow: bool = True, rough: bool = False) -> ColmapModel:
        self.built.append((sorted(poses), grow))
        model = super().build(poses, grow=False, rough=rough)
        numbers = sorted(poses)

        class Model(ColmapModel):
            def groups(self, min_shared: int, min_views: int = 2) -> list[list[int]]:
                assert (min_shared, min_views) in ((MIN_SHARED, 2), (MIN_SHARED, 3))
                return [numbers[1:], numbers[:1]]

        return Model(model.reconstruction)


def test_taking_apart_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = ring(5, turn_deg=80, points=100)
    given = make_input(scene, list(combinations(range(5), 2)), [part(scene, range(5), range(10))])
    monkeypatch.setattr(Falling, "built", [])
    monkeypatch.setattr(stage, "Mapper", Falling)
    assert build(given, tmp_path) == []
    # Only the whole may take in further images; a group by itself would grow to what was taken apart.
    assert Falling.built == [
        ([0, 1, 2, 3, 4], True),
        ([1, 2, 3, 4], False),
        ([2, 3, 4], False),
        ([3, 4], False),
    ]


class Apart(Mapper):
    """Builds a whole that falls into two groups and an image, of which the one group takes in the image again, and the
    other would take in one of the first group."""

    built: ClassVar[list[tuple[list[int], bool]]] = []
    whole: ClassVar[dict[int, Float64]] = {}

    def build(self, poses: Mapping[int, Float64], *, grow: bool = True, rough: bool = False) -> ColmapModel:
        self.built.append((sorted(poses), grow))
        further = {0: [7], 4: [0]}.get(min(poses), []) if grow and len(poses) < 8 else []
        model = super().build({**poses, **{image: self.whole[image] for image in further}}, grow=False, rough=rough)

        if len(poses) == 8:
            self.whole.update(model.poses())

        class Model(ColmapModel):
            def groups(self, min_shared: int, min_views: int = 2) -> list[list[int]]:
                found = super().groups(min_shared, min_views)
                return [[0, 1, 2, 3], [4, 5, 6], [7]] if len(poses) == 8 else found

        return Model(model.reconstruction)


def test_a_group_takes_in_what_no_other_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = ring(8, turn_deg=120, points=100)
    given = make_input(scene, list(combinations(range(8), 2)), [part(scene, range(8), range(28))])
    monkeypatch.setattr(Apart, "built", [])
    monkeypatch.setattr(Apart, "whole", {})
    monkeypatch.setattr(stage, "Mapper", Apart)
    names = [list(model.cam_from_world) for model in build(given, tmp_path)]
    assert names == [[given.names[image] for image in (0, 1, 2, 3, 7)], list(given.names[4:7])]
    assert Apart.built == [
        (list(range(8)), True),
        ([0, 1, 2, 3], True),
        ([4, 5, 6], True),
        ([4, 5, 6], False),
    ]


def no_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """What alignment did not place fails to be registered while models are made."""
    monkeypatch.setattr(Mapper, "_register_more", lambda *_: 0)


def test_an_image_is_tried_again_against_the_finished_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_growth(monkeypatch)
    scene = ring(9, points=150)
    large, small = [0, 1, 2, 3, 4], [5, 6, 7]
    # The last one matches the smaller part, of which it stands in no model's alignment.
    pairs = [*combinations(large, 2), *combinations([*small, 8], 2)]
    given = make_input(scene, pairs, [part(scene, large, range(10)), part(scene, small, [10, 11, 13])])
    models = build(given, tmp_path)
    assert [sorted(model.poses()) for model in models] == [large, [*small, 8]]
    for model in models:
        assert worst_error(model, scene) < 0.05


def test_an_image_of_nonsense_stays_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_growth(monkeypatch)
    scene, rng = ring(6, turn_deg=100, points=200), np.random.default_rng(0)
    pairs = list(combinations(range(6), 2))
    among = [edge for edge, pair in enumerate(pairs) if max(pair) < 5]
    given = make_input(scene, pairs, [part(scene, range(5), among)])
    matches = [
        match if max(pair) < 5 else replace(match, xy_second=rng.uniform([0, 0], [640, 480], match.xy_second.shape))
        for pair, match in zip(pairs, given.matches, strict=True)
    ]
    (model,) = build(replace(given, matches=matches), tmp_path)
    assert sorted(model.poses()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("points", "joins"), [(MIN_SHARED - 1, False), (MIN_SHARED + 1, True)])
def test_an_image_that_next_to_nothing_ties_to_a_model_does_not_join_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: int, joins: bool
) -> None:
    no_growth(monkeypatch)
    scene = ring(6, turn_deg=100, points=200)
    pairs = list(combinations(range(6), 2))
    among = [edge for edge, pair in enumerate(pairs) if max(pair) < 5]
    register = Mapper.register_again

    def thinly(self: Mapper, model: ColmapModel, images: set[int]) -> ColmapModel | None:
        larger = register(self, model, images)
        assert larger is not None
        assert images == {5}
        tracks = larger.tracks()
        return larger.moved(tracks, tracks.xy, (tracks.image != 5) | (tracks.point < points))

    monkeypatch.setattr(Mapper, "register_again", thinly)
    (model,) = build(make_input(scene, pairs, [part(scene, range(5), among)]), tmp_path)
    assert (5 in model.poses()) == joins
