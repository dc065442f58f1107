"""Images that are registered late: adjusted around themselves, and against a finished model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from mast3r_sfm.colmap.cameras import pose_params
from mast3r_sfm.colmap.held import Held
from mast3r_sfm.colmap.mapper import Mapper
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.colmap.registration import MIN_INLIERS
from mast3r_sfm.colmap.solving import adjust_around
from mast3r_sfm.geometry.rigid import compose_poses, make_pose, rotation_from_axis_angle
from mast3r_sfm.types import Bool, Float64, PairMatches
from tests.colmap.test_mapper import NUMBER, arc, errors, noisy, nudged, settings
from tests.exact import Scene

MakeDatabase = Callable[..., Path]
LAST = NUMBER - 1


def with_wrong(scene: Scene, wrong: float, noise_px: float = 0.3) -> list[PairMatches]:
    """All pairs, of which those of the last image match a share of its points to nonsense."""
    rng = np.random.default_rng(7)
    noise = noise_px * rng.normal(size=(NUMBER, len(scene.points), 2))
    matches = []
    for pair in combinations(range(NUMBER), 2):
        match = noisy(scene, *pair, noise)
        if LAST in pair:
            xy = match.xy_second.copy()
            gone = rng.random(len(xy)) < wrong
            xy[gone] = rng.uniform([0, 0], [640, 480], (int(gone.sum()), 2))
            match = replace(match, xy_second=xy)
        matches.append(match)
    return matches


def without_last(scene: Scene, mapper: Mapper) -> ColmapModel:
    return mapper.build(nudged(scene, range(LAST)), grow=False)


@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_an_image_is_registered_to_a_finished_model(make_database: MakeDatabase, wrong: float) -> None:
    scene = arc()
    mapper = Mapper(make_database(scene, with_wrong(scene, wrong)), settings())
    model = without_last(scene, mapper)
    before = model.tracks()
    larger = mapper.register_again(model, [LAST])
    assert larger is not None
    assert sorted(larger.poses()) == list(range(NUMBER))
    assert sorted(model.poses()) == list(range(LAST))  # the model is left alone
    assert len(model.tracks().point) == len(before.point)
    assert errors(larger, scene).error_deg.max() < 0.3
    assert 0.6 * (1 - wrong) * 250 < larger.observations_of_images()[LAST] <= 1.1 * (1 - wrong) * 250
    assert larger.num_points == model.num_points
    # What it shares least with is where it was, to the bit.
    still = [image for image, pose in model.poses().items() if np.array_equal(pose, larger.poses()[image])]
    assert len(still) >= 1


def test_an_image_of_nonsense_stays_out(make_database: MakeDatabase) -> None:
    scene = arc()
    mapper = Mapper(make_database(scene, with_wrong(scene, 1.0)), settings())
    assert mapper.register_again(without_last(scene, mapper), [LAST]) is None


@pytest.mark.parametrize(("points", "comes"), [(MIN_INLIERS - 5, False), (MIN_INLIERS + 20, True)])
def test_an_image_of_few_points_stays_out(make_database: MakeDatabase, points: int, comes: bool) -> None:
    scene = arc()
    matches = []
    for match in with_wrong(scene, 0.0, noise_px=0.0):
        if match.second == LAST:
            kept = np.isin(np.round(match.xy_second, 6), np.round(scene.project(LAST)[:points], 6)).all(axis=1)
            match = only(match, kept)
        matches.append(match)
    mapper = Mapper(make_database(scene, matches), settings())
    larger = mapper.register_again(without_last(scene, mapper), [LAST])
    assert (larger is not None) == comes


def only(match: PairMatches, kept: Bool) -> PairMatches:
    """Some of the matches of a pair."""
    return replace(
        match,
        **{
            name: getattr(match, name)[kept]
            for name in ("xy_first", "xy_second", "confidence", "points_first", "points_second")
        },
    )


def test_nothing_is_tried_that_stands_in_the_model_or_that_nobody_knows(make_database: MakeDatabase) -> None:
    scene = arc()
    mapper = Mapper(make_database(scene), settings())
    model = mapper.build(nudged(scene, range(NUMBER)))
    assert mapper.register_again(model, range(NUMBER)) is None
    assert mapper.register_again(model, []) is None
    assert mapper.register_again(model, [NUMBER + 3]) is None


def test_one_image_helps_the_next(make_database: MakeDatabase) -> None:
    """The last one matches the one before it alone, which is not in the model either."""
    scene = arc()
    pairs = [pair for pair in combinations(range(NUMBER), 2) if LAST not in pair or LAST - 1 in pair]
    mapper = Mapper(make_database(scene, [scene.matches(*pair) for pair in pairs]), settings())
    larger = mapper.register_again(mapper.build(nudged(scene, range(LAST - 1)), grow=False), [LAST, LAST - 1])
    assert larger is not None
    assert sorted(larger.poses()) == list(range(NUMBER))
    assert errors(larger, scene).error_deg.max() < 0.1


def test_poses_that_are_known_stay_to_the_bit(make_database: MakeDatabase) -> None:
    scene = arc()
    fixed = {image: pose_params(scene.poses[image]) for image in (0, 1, 3, 4)}
    held = Held.of(scene.rig(), fixed)
    mapper = Mapper(make_database(scene, with_wrong(scene, 0.2)), settings(), held)
    model = without_last(scene, mapper)
    assert mapper.register_again(model, [0, 1]) is None
    larger = mapper.register_again(model, [LAST])
    assert larger is not None
    assert LAST in larger.poses()
    for image in fixed:
        np.testing.assert_array_equal(larger.poses()[image], model.poses()[image])
    assert errors(larger, scene).error_deg.max() < 0.3


def pushed(model: ColmapModel, image: int, turn_deg: float = 0.5) -> pycolmap.Reconstruction:
    """A copy in which one image stands wrong."""
    changed = pycolmap.Reconstruction(model.reconstruction)
    turn = rotation_from_axis_angle(np.radians([turn_deg, 0.0, 0.0]))
    pose: Float64 = compose_poses(make_pose(turn, np.array([0.05, 0.0, 0.0])), model.poses()[image])
    frame = changed.frame(changed.image(image + 1).frame_id)
    frame.rig_from_world = pycolmap.Rigid3d(pycolmap.Rotation3d(pose[:, :3]), pose[:, 3])
    return changed


def test_an_image_is_adjusted_around_itself(make_database: MakeDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mast3r_sfm.colmap.solving.NEIGHBOURS", 3)
    scene = arc()
    mapper = Mapper(make_database(scene), settings())
    model = mapper.build(nudged(scene, range(NUMBER)))
    wrong = pushed(model, 2)
    assert errors(ColmapModel(wrong), scene).error_deg.max() > 0.4
    options = pycolmap.BundleAdjustmentOptions()
    options.print_summary = False
    adjust_around(wrong, 3, options, Held())
    adjusted = ColmapModel(wrong)
    assert errors(adjusted, scene).error_deg.max() < 0.05
    moved = [image for image, pose in model.poses().items() if not np.array_equal(pose, adjusted.poses()[image])]
    # Itself, and of its three neighbours the one that does not hold the frame.
    assert 2 in moved
    assert len(moved) <= 2
    assert [list(camera.params) for camera in wrong.cameras.values()] == [
        list(camera.params) for camera in model.reconstruction.cameras.values()
    ]


def test_an_image_most_of_whose_matches_disagree_stays_out(make_database: MakeDatabase) -> None:
    """A fifth of them would be enough by their number."""
    scene = arc()
    model_of = {}
    for wrong in (0.6, 0.85):
        mapper = Mapper(make_database(scene, with_wrong(scene, wrong, noise_px=0.0)), settings())
        model_of[wrong] = mapper.register_again(without_last(scene, mapper), [LAST])
    assert model_of[0.6] is not None
    assert model_of[0.85] is None


def test_known_neighbours_stay_while_an_image_is_adjusted(make_database: MakeDatabase) -> None:
    scene = arc()
    mapper = Mapper(make_database(scene, with_wrong(scene, 0.0)), settings())
    model = mapper.build(nudged(scene, range(NUMBER)))
    options = pycolmap.BundleAdjustmentOptions()
    options.print_summary = False
    held = Held(poses={image + 1: pose_params(model.poses()[image]) for image in (0, 1, 3, 4, 5)})
    wrong = pushed(model, 2)
    adjust_around(wrong, 3, options, held)
    for image, pose in model.poses().items():
        # But for the last bit: the solver writes quaternions back as they are after another division by their length.
        moved = np.abs(ColmapModel(wrong).poses()[image] - pose).max()
        assert moved < 1e-15 if image != 2 else moved > 1e-5
