"""From approximate poses to the true model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial import cKDTree

from mast3r_sfm.colmap.mapper import Mapper, MapperSettings
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.config import MapConfig
from mast3r_sfm.evaluation.pairs import PairErrors, measure_pairs
from mast3r_sfm.geometry.rigid import compose_poses, make_pose, rotation_from_axis_angle
from mast3r_sfm.types import Bool, Float64, PairMatches, Tracks
from tests.exact import Scene, ring

MakeDatabase = Callable[..., Path]
NUMBER = 6


def settings(**values: float) -> MapperSettings:
    return MapperSettings(config=MapConfig(), pixel_scale=1.0, threads=1, seed=0, **values)


def arc() -> Scene:
    return ring(NUMBER, turn_deg=100, points=250)


def nudged(scene: Scene, images: range | list[int], seed: int = 0) -> dict[int, Float64]:
    """Poses that are a degree and a few per cent off, as alignment leaves them."""
    rng = np.random.default_rng(seed)
    turns = rotation_from_axis_angle(rng.normal(0, np.radians(0.8), (len(images), 3)))
    shifts = rng.normal(0, 0.06, (len(images), 3))
    return {
        image: compose_poses(make_pose(turn, shift), scene.poses[image])
        for image, turn, shift in zip(images, turns, shifts, strict=True)
    }


def errors(model: ColmapModel, scene: Scene) -> PairErrors:
    truth = {f"left/{image:02d}.jpg": pose for image, pose in enumerate(scene.poses)}
    return measure_pairs([model.cam_from_world], truth, sorted(model.cam_from_world))


def noisy(scene: Scene, first: int, second: int, noise: Float64) -> PairMatches:
    """The true matches with noise [N, K, 2], the same at a point's pixel in every pair."""
    match = scene.matches(first, second)
    seen = scene.sees(first) & scene.sees(second)
    return replace(match, xy_first=match.xy_first + noise[first][seen], xy_second=match.xy_second + noise[second][seen])


@pytest.mark.parametrize("focal_factor", [1.0, 1.08])
def test_exact_tracks_give_exact_poses_and_the_focal_length(make_database: MakeDatabase, focal_factor: float) -> None:
    scene = arc()
    model = Mapper(make_database(scene, focal_factor=focal_factor), settings()).build(nudged(scene, range(NUMBER)))
    assert len(model.cam_from_world) == NUMBER
    found = errors(model, scene)
    assert found.error_deg.max() < 0.05
    assert model.num_points == pytest.approx(250, abs=2)
    for camera in model.cameras.values():
        assert camera.model == "SIMPLE_RADIAL"
        assert camera.params[0] == pytest.approx(600, rel=0.005)
        assert camera.params[3] == pytest.approx(0, abs=0.005)
    summary = model.summary("sparse/0")
    assert summary.mean_reprojection_error_px < 0.05
    assert summary.mean_track_length == pytest.approx(NUMBER, abs=0.1)


def test_a_rough_model_is_adjusted_less_and_good_enough_to_refine_from(make_database: MakeDatabase) -> None:
    scene = arc()
    noise = np.random.default_rng(4).normal(0, 1.0, (NUMBER, len(scene.points), 2))
    matches = [noisy(scene, *pair, noise) for pair in combinations(range(NUMBER), 2)]
    mapper = Mapper(make_database(scene, matches, focal_factor=1.3), settings())
    full, rough = (mapper.build(nudged(scene, range(NUMBER)), rough=rough) for rough in (False, True))
    assert rough.num_points == pytest.approx(full.num_points, rel=0.02)
    apart = measure_pairs([rough.cam_from_world], full.cam_from_world, sorted(full.cam_from_world)).error_deg.max()
    assert 1e-4 < apart < 0.1


def test_noise_leaves_noise(make_database: MakeDatabase) -> None:
    scene = arc()
    noise = 0.5 * np.random.default_rng(0).normal(size=(NUMBER, 250, 2))
    matches = [noisy(scene, *pair, noise) for pair in combinations(range(NUMBER), 2)]
    model = Mapper(make_database(scene, matches), settings()).build(nudged(scene, range(NUMBER)))
    found = errors(model, scene)
    assert 0.005 < found.rotation_deg.mean() < 0.15
    assert 0.005 < found.translation_deg.mean() < 0.3
    assert 0.4 < model.summary("").mean_reprojection_error_px < 0.8
    assert model.observed_share > 0.98


def test_an_image_without_a_pose_is_registered(make_database: MakeDatabase) -> None:
    scene = arc()
    model = Mapper(make_database(scene), settings()).build(nudged(scene, [0, 1, 2, 4, 5]))
    assert len(model.cam_from_world) == NUMBER
    assert errors(model, scene).error_deg.max() < 0.05


def test_cameras_of_one_photo_each_get_no_distortion(make_database: MakeDatabase) -> None:
    scene = arc()
    database = make_database(scene, own_cameras=True, focal_factor=1.05)
    model = Mapper(database, settings()).build(nudged(scene, [0, 1, 2, 4, 5]))
    assert len(model.cam_from_world) == NUMBER  # the last one is registered with a camera of its own
    assert errors(model, scene).error_deg.max() < 0.1
    for camera in model.cameras.values():
        assert camera.model == "SIMPLE_RADIAL"
        assert camera.params[0] == pytest.approx(600, rel=0.01)
        assert camera.params[3] == 0


@pytest.mark.parametrize("shift_px", [0.0, 12.0])
def test_the_principal_point_moves_only_where_it_is_off(make_database: MakeDatabase, shift_px: float) -> None:
    scene = arc()
    noise = 0.3 * np.random.default_rng(1).normal(size=(NUMBER, 250, 2)) + [shift_px, 0.0]
    matches = [noisy(scene, *pair, noise) for pair in combinations(range(NUMBER), 2)]
    model = Mapper(make_database(scene, matches), settings()).build(nudged(scene, range(NUMBER)))
    camera = model.cameras["left/00.jpg"]
    x, y = camera.params[1:3]
    if shift_px:
        assert x == pytest.approx(camera.width_px / 2 + shift_px, abs=3)
        assert abs(y - camera.height_px / 2) < 3
    else:
        assert (x, y) == (camera.width_px / 2, camera.height_px / 2)
    assert errors(model, scene).error_deg.max() < 0.3


def test_two_images_are_enough(make_database: MakeDatabase) -> None:
    scene = ring(2, turn_deg=40, points=120)
    model = Mapper(make_database(scene), settings()).build(dict(enumerate(scene.poses)))
    assert len(model.cam_from_world) == 2
    assert model.num_points > 100
    assert errors(model, scene).error_deg.max() < 1


def test_wrong_matches_are_filtered(make_database: MakeDatabase) -> None:
    scene = arc()
    rng = np.random.default_rng(0)
    matches = []
    for pair in combinations(range(NUMBER), 2):
        match = scene.matches(*pair)
        xy_second = match.xy_second.copy()
        wrong = rng.choice(250, 25, replace=False)
        xy_second[wrong] = rng.uniform([0, 0], [640, 480], (25, 2))
        matches.append(replace(match, xy_second=xy_second))
    model = Mapper(make_database(scene, matches), settings()).build(nudged(scene, range(NUMBER)))
    assert len(model.cam_from_world) == NUMBER
    assert errors(model, scene).error_deg.max() < 0.05
    assert 200 < model.num_points < 300
    assert model.summary("").mean_reprojection_error_px < 0.1


def test_an_image_stands_in_a_track_once(make_database: MakeDatabase) -> None:
    """Two keypoints of one image that are tied to one point in another: the less confident one is no observation."""
    scene = arc()
    matches = [scene.matches(*pair) for pair in combinations(range(NUMBER), 2)]
    doubled = []
    for match in matches:
        if match.first == 0 and match.second % 2:
            # Half of image 0's pairs see its points two pixels aside, and are less sure of it.
            match = replace(match, xy_first=match.xy_first + 2.0, confidence=match.confidence / 2)
        doubled.append(match)
    model = Mapper(make_database(scene, doubled), settings()).build(nudged(scene, range(NUMBER)))
    tracks = model.tracks()
    assert is_once(tracks)
    assert len(tracks.points) > 245
    lengths = np.bincount(tracks.point)
    assert lengths.max() == NUMBER
    assert lengths.mean() > 0.98 * NUMBER
    mine = tracks.xy[tracks.image == 0]
    assert cKDTree(scene.project(0)).query(mine)[0].max() < 1e-3
    assert errors(model, scene).error_deg.max() < 0.05


def is_once(tracks: Tracks) -> bool:
    """Whether no track holds two observations of one image."""
    return len(np.unique(np.stack([tracks.point, tracks.image]), axis=1).T) == len(tracks.point)


@pytest.mark.parametrize("seed", range(3))
def test_completing_and_merging_tracks_does_not_double_images(make_database: MakeDatabase, seed: int) -> None:
    """COLMAP follows the matches of the database alone, and these hold no two keypoints of an image together."""
    scene, rng = ring(NUMBER, turn_deg=100, points=400), np.random.default_rng(seed)
    matches = []
    for pair in combinations(range(NUMBER), 2):
        match = scene.matches(*pair)
        # Noise of each pair's own, so that each point has several keypoints close together in every image.
        steps = [rng.integers(-1, 2, match.xy_first.shape) for _ in range(2)]
        confidence = rng.uniform(0.1, 1, len(match)).astype(np.float32)
        matches.append(
            replace(
                match,
                xy_first=match.xy_first + steps[0],
                xy_second=match.xy_second + steps[1],
                confidence=confidence,
            )
        )
    model = Mapper(make_database(scene, matches), settings()).build(nudged(scene, [0, 1, 2, 4, 5], seed))
    tracks = model.tracks()
    assert len(tracks.points) > 400
    assert is_once(tracks)
    # There was something to double: points stand in the same places.
    assert (cKDTree(tracks.points).query(tracks.points, k=2)[0][:, 1] < 0.02).mean() > 0.1


def test_building_again_gives_the_same(make_database: MakeDatabase) -> None:
    """Cameras that one model refined do not leak into the next."""
    scene = arc()
    mapper = Mapper(make_database(scene, focal_factor=1.05), settings())
    one, two = (mapper.build(nudged(scene, range(NUMBER))) for _ in range(2))
    for name, pose in one.cam_from_world.items():
        np.testing.assert_array_equal(pose, two.cam_from_world[name])
    np.testing.assert_array_equal(
        [camera.params for camera in one.cameras.values()], [camera.params for camera in two.cameras.values()]
    )


def test_two_parts_become_two_models(make_database: MakeDatabase) -> None:
    scene = ring(8, points=150)
    matches = [scene.matches(*pair) for part in (range(4), range(4, 8)) for pair in combinations(part, 2)]
    mapper = Mapper(make_database(scene, matches), settings())
    for part in (range(4), range(4, 8)):
        model = mapper.build(nudged(scene, part))
        assert sorted(model.cam_from_world) == [f"left/{image:02d}.jpg" for image in part]
        assert errors(model, scene).error_deg.max() < 0.05


@pytest.mark.parametrize("camera_model", ["SIMPLE_PINHOLE", "PINHOLE", "RADIAL", "OPENCV"])
def test_the_camera_model_is_the_one_asked_for(make_database: MakeDatabase, camera_model: str) -> None:
    scene = arc()
    config = MapperSettings(config=MapConfig(camera_model=camera_model), pixel_scale=1.0, threads=1, seed=0)
    model = Mapper(make_database(scene, camera_model=camera_model), config).build(nudged(scene, range(NUMBER)))
    assert {camera.model for camera in model.cameras.values()} == {camera_model}
    assert len(model.cam_from_world) == NUMBER
    assert errors(model, scene).error_deg.max() < 0.1


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model of noisy keypoints, with the truth of its observations."""

    mapper: Mapper
    model: ColmapModel
    tracks: Tracks
    true: Float64
    """[O, 2] pixels of the observations without noise."""

    def readjusted(self, xy: Float64, kept: Bool | None = None) -> ColmapModel:
        """The model adjusted to other pixels [O, 2] of its observations."""
        kept = np.ones(len(xy), bool) if kept is None else kept
        return self.mapper.readjust(self.model.moved(self.tracks, xy, kept))


BuildNoisy = Callable[..., Built]


@pytest.fixture
def build_noisy(make_database: MakeDatabase) -> BuildNoisy:
    """build_noisy(noise_px, shift_px=…, pixel_scale=…, **database): a model of the arc."""

    def build(noise_px: float, shift_px: float = 0.0, pixel_scale: float = 1.0, **values: Any) -> Built:
        scene = arc()
        noise = noise_px * np.random.default_rng(2).normal(size=(NUMBER, 250, 2)) + [shift_px, 0.0]
        matches = [noisy(scene, *pair, noise) for pair in combinations(range(NUMBER), 2)]
        config = MapConfig(camera_model=values.get("camera_model", "SIMPLE_RADIAL"))
        mapper = Mapper(
            make_database(scene, matches, **values), replace(settings(), config=config, pixel_scale=pixel_scale)
        )
        model = mapper.build(nudged(scene, range(NUMBER)))
        tracks = model.tracks()
        true = np.empty_like(tracks.xy)
        for image in range(NUMBER):
            mine = tracks.image == image
            nearest = cKDTree(scene.project(image) + noise[image]).query(tracks.xy[mine])[1]
            true[mine] = scene.project(image)[nearest]
        return Built(mapper=mapper, model=model, tracks=tracks, true=true)

    return build


def middle(model: ColmapModel) -> Float64:
    """Principal point minus the middle of the photos, in pixels."""
    (params,) = {tuple(camera.params) for camera in model.cameras.values()}
    return np.array(params[1:3]) - [320, 240]


def test_better_observations_make_a_better_model(build_noisy: BuildNoisy) -> None:
    built, scene = build_noisy(0.7), arc()
    before = errors(built.model, scene)
    assert before.error_deg.max() > 0.1
    slight = 0.05 * np.random.default_rng(3).normal(size=built.true.shape)
    model = built.readjusted(built.true + slight)
    after = errors(model, scene)
    assert 0.001 < after.error_deg.mean() < 0.25 * before.error_deg.mean()
    assert after.error_deg.max() < 0.05
    assert 0.03 < model.summary("").mean_reprojection_error_px < 0.08
    assert built.model.summary("").mean_reprojection_error_px > 0.5
    assert model.cameras["left/00.jpg"].params[0] == pytest.approx(600, rel=1e-3)
    # Nothing is added, and nothing that is true goes.
    assert model.num_points == built.model.num_points
    assert len(model.tracks().xy) == len(built.true)


def test_the_same_observations_change_little(build_noisy: BuildNoisy) -> None:
    built, scene = build_noisy(0.12), arc()  # as refined observations have
    again = built.readjusted(built.tracks.xy)
    assert len(again.tracks().xy) > 0.97 * len(built.true)
    assert errors(again, scene).error_deg.max() < 1.3 * errors(built.model, scene).error_deg.max()


@pytest.mark.parametrize(("off_px", "pixel_scale", "dropped"), [(1.5, 1, 0), (3, 1, 30), (3, 2, 0), (6, 2, 30)])
def test_refined_observations_must_fit_twice_as_well(
    build_noisy: BuildNoisy, off_px: float, pixel_scale: float, dropped: int
) -> None:
    built = build_noisy(0.3, pixel_scale=pixel_scale)
    rng = np.random.default_rng(5)
    xy, wrong = built.true.copy(), rng.choice(len(built.true), 30, replace=False)
    angle = rng.uniform(0, 2 * np.pi, 30)
    xy[wrong] += off_px * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    model = built.readjusted(xy)
    assert len(xy) - len(model.tracks().xy) == dropped
    assert errors(model, arc()).error_deg.max() < (1e-4 if dropped else 0.1)


@pytest.mark.parametrize(
    ("raw_px", "refined_px", "expected_px"),
    [(0.0, 0.0, 0.0), (12.0, 12.0, 12.0), (12.0, 15.0, 15.0), (12.0, 0.0, 0.0), (0.0, 12.0, 0.0), (12.0, -8.0, 0.0)],
    ids=["never off", "off", "about as far off", "not off after all", "off only when refined", "off elsewhere"],
)
def test_refined_observations_confirm_principal_points(
    build_noisy: BuildNoisy, raw_px: float, refined_px: float, expected_px: float
) -> None:
    built = build_noisy(0.3, raw_px)
    assert abs(middle(built.model)[0] - raw_px) < 3
    slight = 0.05 * np.random.default_rng(3).normal(size=built.true.shape)
    model = built.readjusted(built.true + np.array([refined_px, 0.0]) + slight)
    if expected_px:
        np.testing.assert_allclose(middle(model), [expected_px, 0.0], atol=0.5)
    else:
        assert middle(model).tolist() == [0.0, 0.0]
    if refined_px == expected_px:
        assert errors(model, arc()).error_deg.max() < 0.05


def test_points_that_lost_their_observations_stay_away(build_noisy: BuildNoisy) -> None:
    built = build_noisy(0.5)
    gone = built.tracks.point < 100
    model = built.readjusted(built.true, ~gone)
    assert model.num_points == built.model.num_points - 100
    assert list(model.cam_from_world) == list(built.model.cam_from_world)
    assert errors(model, arc()).error_deg.max() < 1e-4


@pytest.mark.parametrize(("camera_model", "pinhole"), [("SIMPLE_PINHOLE", 3), ("SIMPLE_RADIAL", 3), ("OPENCV", 4)])
@pytest.mark.parametrize("own_cameras", [False, True])
def test_readjusted_cameras_stay_what_they_were(
    build_noisy: BuildNoisy, camera_model: str, pinhole: int, own_cameras: bool
) -> None:
    """Cameras of one photo each still get no distortion."""
    built = build_noisy(0.3, camera_model=camera_model, own_cameras=own_cameras)
    model = built.readjusted(built.true)
    for camera in model.cameras.values():
        assert camera.model == camera_model
        assert camera.params[0] == pytest.approx(600, rel=1e-3)
        distortion = camera.params[pinhole:]
        assert np.abs(distortion).max(initial=0.0) < (1e-12 if own_cameras else 1e-3)
    assert errors(model, arc()).error_deg.max() < 0.01
    assert len(model.cameras) == NUMBER


def test_readjusting_does_not_leak_into_the_next_model(build_noisy: BuildNoisy) -> None:
    built = build_noisy(0.5)
    built.readjusted(built.true)
    again = built.mapper.build(nudged(arc(), range(NUMBER)))
    for name, pose in built.model.cam_from_world.items():
        np.testing.assert_array_equal(pose, again.cam_from_world[name])


def test_a_model_keeps_its_distortion_when_another_was_built_meanwhile(build_noisy: BuildNoisy) -> None:
    """Of two photos, the shared camera would get none."""
    built = build_noisy(0.5)
    assert len(built.mapper.build({0: arc().poses[0], 1: arc().poses[1]}).cameras) >= 2
    slight = 0.1 * np.random.default_rng(3).normal(size=built.true.shape)
    model = built.readjusted(built.true + slight)
    assert {camera.params[3] != 0 for camera in model.cameras.values()} == {True}
    assert errors(model, arc()).error_deg.max() < 0.1


def extended(built: Built, gone: Bool, off_px: Float64 | float = 0.0) -> ColmapModel:
    """The model adjusted to true observations but some, which are then further ones, so much off."""
    slight = 0.05 * np.random.default_rng(3).normal(size=built.true.shape)
    adjusted = built.readjusted(built.true + slight, ~gone)
    assert adjusted.num_points == len(built.tracks.points)
    more = Tracks(
        points=adjusted.tracks().points,
        point=built.tracks.point[gone],
        image=built.tracks.image[gone],
        keypoint=np.full(int(gone.sum()), -1),
        xy=(built.true + slight + off_px)[gone],
    )
    return adjusted.extended(more)


def test_readjusting_keeps_further_observations(build_noisy: BuildNoisy) -> None:
    """The database does not know their keypoints."""
    built = build_noisy(0.5)
    gone = np.isin(built.tracks.image, (1, 4)) & (built.tracks.point % 3 > 0)
    before = extended(built, gone)
    model = built.mapper.readjust(before)
    assert len(model.tracks().point) == len(built.tracks.point)
    assert model.num_points == built.model.num_points
    for image, xy in before.keypoints().items():
        # No keypoint comes, goes or moves.
        np.testing.assert_array_equal(model.keypoints()[image], xy)
        new = len(xy) - len(built.model.keypoints()[image])
        assert new == (gone & (built.tracks.image == image)).sum()
        assert (new > 100) == (image in (1, 4))
    assert list(model.cam_from_world) == list(built.model.cam_from_world)
    assert errors(model, arc()).error_deg.max() < 0.03


def test_further_observations_hold_an_image(build_noisy: BuildNoisy) -> None:
    """Without them, one that kept few stands less well."""
    built = build_noisy(0.5)
    many = extended(built, (built.tracks.image == 4) & (built.tracks.point >= 10))
    tracks = many.tracks()
    few = many.moved(tracks, tracks.xy, tracks.keypoint < 250)
    assert np.bincount(few.tracks().image)[4] == 10
    assert np.bincount(tracks.image)[4] > 240
    with_few, with_many = (errors(built.mapper.readjust(model), arc()).error_deg.max() for model in (few, many))
    assert with_many < 0.03
    assert with_few > 1.5 * with_many


def test_further_observations_that_do_not_fit_are_dropped(build_noisy: BuildNoisy) -> None:
    built = build_noisy(0.5)
    gone = np.isin(built.tracks.image, (1, 4)) & (built.tracks.point % 5 == 0)
    wrong = gone & (built.tracks.image == 4)
    before = extended(built, gone, np.where(wrong[:, None], 9.0, 0.0))
    model = built.mapper.readjust(before)
    tracks = model.tracks()
    assert len(tracks.point) == len(built.tracks.point) - wrong.sum()
    count = np.bincount(tracks.image) - np.bincount(built.tracks.image[~wrong])
    assert not count.any()
    assert errors(model, arc()).error_deg.max() < 0.03
    # Their keypoints stay, as other keypoints without a point do.
    for image, xy in before.keypoints().items():
        np.testing.assert_array_equal(model.keypoints()[image], xy)


def test_without_growing_a_model_holds_the_given_images_alone(make_database: MakeDatabase) -> None:
    scene = arc()
    mapper = Mapper(make_database(scene), settings())
    model = mapper.build(nudged(scene, [0, 1, 2, 4]), grow=False)
    assert sorted(model.poses()) == [0, 1, 2, 4]
    assert errors(model, scene).error_deg.max() < 0.05
    assert sorted(mapper.build(nudged(scene, [0, 1, 2, 4])).poses()) == list(range(NUMBER))


def test_an_image_that_is_lost_again_each_time_ends_the_growing(
    make_database: MakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, rounds = arc(), 0

    def register(*_: object) -> int:
        nonlocal rounds
        rounds += 1
        return int(rounds < 30)  # it says so, and the next adjustment loses the image

    monkeypatch.setattr(Mapper, "_register_more", register)
    model = Mapper(make_database(scene), settings()).build(nudged(scene, [0, 1, 2, 4]), rough=True)
    assert sorted(model.poses()) == [0, 1, 2, 4]
    assert 0 < rounds < 4


def test_a_confirmed_image_is_held_by_points_of_two_views(make_database: MakeDatabase) -> None:
    scene = arc()
    shared, third, fourth = (replace(scene, points=points) for points in np.split(scene.points, [150, 200]))
    among = [shared.matches(*pair) for pair in combinations(range(5), 2)]
    poses = nudged(scene, range(NUMBER))
    thin = [*among, third.matches(3, 5), fourth.matches(4, 5)]
    database = make_database(scene, thin)
    model = Mapper(database, settings(), confirmed=[5]).build(poses, grow=False)
    assert len(model.cam_from_world) == NUMBER
    assert errors(model, scene).error_deg.max() < 0.1
    assert 80 <= (np.bincount(model.tracks().point) == 2).sum() <= 100
    # Of an image that nothing confirms, they would say no more than its pairs do.
    others = Mapper(database, settings()).build(poses, grow=False)
    assert not (np.bincount(others.tracks().point) == 2).any()


def test_images_that_many_points_hold_get_none_of_two_views(make_database: MakeDatabase) -> None:
    scene = arc()
    shared = replace(scene, points=scene.points[:150])
    matches = [shared.matches(*pair) for pair in combinations(range(NUMBER), 2)]
    matches[0] = scene.matches(0, 1)  # a hundred points that nothing else sees
    model = Mapper(make_database(scene, matches), settings()).build(nudged(scene, range(NUMBER)), grow=False)
    assert len(model.cam_from_world) == NUMBER
    assert np.bincount(model.tracks().point).min() > 2
