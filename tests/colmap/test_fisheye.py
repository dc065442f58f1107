"""Fisheye lenses: what the model is told is a pinhole camera's guess, and what comes out is the lens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from mast3r_sfm.alignment.stage import align
from mast3r_sfm.colmap.mapper import Mapper, MapperSettings
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.config import AlignConfig, MapConfig, MatchConfig
from mast3r_sfm.evaluation.pairs import measure_pairs
from mast3r_sfm.geometry.rigid import compose_poses, make_pose, rotation_from_axis_angle, transform_points
from mast3r_sfm.mapping.stage import MapInput, build_models, write_matches
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.stage import Matcher
from mast3r_sfm.progress import SilentProgress
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.synthetic.cameras import look_at
from mast3r_sfm.types import AlignmentResult, Float64, ImageRecord, PairMatches, Rig
from tests.exact import CENTRE_PX, HEIGHT_PX, WIDTH_PX, Describer, Listener, Scene, all_pairs, no_sift

NUMBER, POINTS = 8, 900
FISHEYES = ["OPENCV_FISHEYE", "RADIAL_FISHEYE", "SIMPLE_RADIAL_FISHEYE"]


@dataclass(frozen=True, kw_only=True)
class FisheyeScene(Scene):
    """Seen through a lens with r = f (θ + k θ³), of 100° from left to right for f = 367."""

    k: float = 0.0

    def project(self, image: int) -> Float64:
        local = transform_points(self.poses[image], self.points)
        across = np.linalg.norm(local[:, :2], axis=1)
        angle = np.arctan2(across, local[:, 2])
        radius = self.focal_px * (angle + self.k * angle**3)
        return local[:, :2] / across.clip(min=1e-12)[:, None] * radius[:, None] + CENTRE_PX


def gallery(k: float) -> FisheyeScene:
    """Cameras that walk along a wide front and look about."""
    rng = np.random.default_rng(5)
    points = rng.uniform([-9, -6, 2.5], [9, 6, 9], (POINTS, 3))
    places = np.stack([np.linspace(-2, 2, NUMBER), rng.uniform(-0.7, 0.7, NUMBER), rng.uniform(-1, 1, NUMBER)], axis=1)
    targets = np.stack([rng.uniform(-2, 2, NUMBER), rng.uniform(-1, 1, NUMBER), np.full(NUMBER, 5.0)], axis=1)
    poses = np.stack([look_at(place, target) for place, target in zip(places, targets, strict=True)])
    return FisheyeScene(points=points, poses=poses, focal_px=367.0, k=k)


def matched(scene: Scene, noise_px: float) -> list[PairMatches]:
    noise = noise_px * np.random.default_rng(7).normal(size=(NUMBER, POINTS, 2))
    found = []
    for first, second in combinations(range(NUMBER), 2):
        match, seen = scene.matches(first, second), scene.sees(first) & scene.sees(second)
        found.append(
            replace(
                match, xy_first=match.xy_first + noise[first][seen], xy_second=match.xy_second + noise[second][seen]
            )
        )
    return found


def nudged(scene: Scene) -> Float64:
    """Poses a degree and some per cent off."""
    rng = np.random.default_rng(3)
    turns = rotation_from_axis_angle(rng.normal(0, np.radians(0.8), (NUMBER, 3)))
    shifts = rng.normal(0, 0.05, (NUMBER, 3))
    return np.stack([compose_poses(make_pose(t, s), p) for t, s, p in zip(turns, shifts, scene.poses, strict=True)])


def radii(model: ColmapModel, degrees: Float64) -> Float64:
    """Pixels from the principal point at which the model's one camera shows rays at some angles from its axis."""
    (camera,) = {(camera.model, tuple(camera.params)) for camera in model.cameras.values()}
    lens = pycolmap.Camera(model=camera[0], width=WIDTH_PX, height=HEIGHT_PX, params=list(camera[1]))
    angle = np.radians(degrees)
    rays = np.stack([np.sin(angle), np.zeros_like(angle), np.cos(angle)], axis=1)
    return np.asarray(lens.img_from_cam(rays))[:, 0] - lens.principal_point_x


def seen_by_three(scene: Scene) -> int:
    return int((np.sum([scene.sees(image) for image in range(NUMBER)], axis=0) >= 3).sum())


def pose_errors(model: ColmapModel, scene: Scene) -> Float64:
    names = sorted(model.cam_from_world)
    assert len(names) == NUMBER
    return measure_pairs([model.cam_from_world], dict(zip(names, scene.poses, strict=True)), names).error_deg


@pytest.mark.parametrize("camera_model", FISHEYES)
@pytest.mark.parametrize("k", [0.0, -0.06, 0.05])
@pytest.mark.parametrize("focal_factor", [0.9, 1.1])
def test_the_lens_comes_out_of_a_guessed_focal_length(
    make_database: Callable[..., Path], camera_model: str, k: float, focal_factor: float
) -> None:
    scene = gallery(k)
    database = make_database(scene, matched(scene, 0.3), camera_model=camera_model, focal_factor=focal_factor)
    settings = MapperSettings(config=MapConfig(camera_model=camera_model), pixel_scale=1.0, threads=1, seed=0)
    model = Mapper(database, settings).build(dict(enumerate(nudged(scene))))
    assert {camera.model for camera in model.cameras.values()} == {camera_model}
    assert 0 < pose_errors(model, scene).max() < 0.2
    degrees = np.array([5.0, 20.0, 35.0, 50.0])
    angle = np.radians(degrees)
    np.testing.assert_allclose(radii(model, degrees), 367 * (angle + k * angle**3), atol=0.5)
    assert model.summary("").mean_reprojection_error_px < 0.5
    assert model.num_points > 0.97 * seen_by_three(scene)


def test_a_pinhole_model_does_not_explain_it(make_database: Callable[..., Path]) -> None:
    scene = gallery(0.0)
    database = make_database(scene, matched(scene, 0.3), camera_model="SIMPLE_PINHOLE")
    settings = MapperSettings(config=MapConfig(camera_model="SIMPLE_PINHOLE"), pixel_scale=1.0, threads=1, seed=0)
    model = Mapper(database, settings).build(dict(enumerate(nudged(scene))))
    worst = pose_errors(model, scene).max() if len(model.cam_from_world) == NUMBER else np.inf
    assert worst > 0.5 or model.num_points < 0.8 * seen_by_three(scene)


@pytest.mark.parametrize("own_cameras", [False, True])
def test_the_map_stage_goes_through(tmp_path: Path, own_cameras: bool) -> None:
    """With a camera for every photo, none has enough of them for distortion, and all keep that of the guess: none."""
    scene = gallery(0.0)
    rig = scene.rig()
    if own_cameras:
        rig = Rig(cameras=rig.cameras * NUMBER, camera_of_image=np.arange(NUMBER, dtype=np.int32))
    matches = matched(scene, 0.3)
    part = AlignmentResult(
        images=np.arange(NUMBER, dtype=np.int32),
        edges=np.arange(len(matches), dtype=np.int32),
        cam_from_world=nudged(scene),
        residual_deg=np.zeros(NUMBER),
        history=(),
        stop_reason="",
    )
    given = MapInput(names=[f"{n}.jpg" for n in range(NUMBER)], rig=rig, matches=matches, parts=[part])
    settings = MapperSettings(config=MapConfig(camera_model="OPENCV_FISHEYE"), pixel_scale=1.0, threads=1, seed=0)
    write_matches(tmp_path / "database.db", given, settings)
    (model,) = build_models(tmp_path / "database.db", given, settings, SilentProgress())
    assert {camera.model for camera in model.cameras.values()} == {"OPENCV_FISHEYE"}
    assert 0 < pose_errors(model, scene).max() < 0.2
    if own_cameras:
        assert all((camera.params[4:] == 0).all() for camera in model.cameras.values())
        np.testing.assert_allclose([camera.params[0] for camera in model.cameras.values()], 367, rtol=0.01)


@pytest.mark.parametrize(("across_deg", "is_known"), [(100, True), (100, False), (140, False)])
def test_from_matches_to_the_lens(across_deg: int, is_known: bool, tmp_path: Path) -> None:
    """The two-view check takes fisheyes for pinholes and loses a part of the matches; what is left is enough."""
    focal_px = WIDTH_PX / np.radians(across_deg)
    around = np.random.default_rng(0).uniform([-25, -15, 1], [25, 15, 9], (1500, 3))
    scene = replace(gallery(0.0), focal_px=focal_px)
    scene = replace(scene, points=np.concatenate([scene.points, around]))
    model = Describer(scene)
    checker = PairChecker(
        model=model, encodings=model.encodings(), config=MatchConfig(features="model"), seed=0, threads=2
    )
    matcher = Matcher(checker=checker, num_images=NUMBER, detect_sift=no_sift)
    edges, _ = matcher.check_graph(all_pairs(NUMBER), StageCache(tmp_path, "match", "key", Listener()), Listener())
    records = [
        ImageRecord(
            name=f"{n}.jpg",
            width_px=WIDTH_PX,
            height_px=HEIGHT_PX,
            sha256="",
            exif_focal_px=focal_px if is_known else None,
        )
        for n in range(NUMBER)
    ]
    rig = matcher.estimate_rig(edges, records)
    matches = matcher.calibrate(edges, rig)
    assert 0.5 < np.mean([match.inlier_ratio for match in matches]) < 0.9
    given = MapInput(
        names=[record.name for record in records],
        rig=rig,
        matches=matches,
        parts=align(matches, NUMBER, AlignConfig(), None),
    )
    settings = MapperSettings(config=MapConfig(camera_model="OPENCV_FISHEYE"), pixel_scale=1.0, threads=1, seed=0)
    write_matches(tmp_path / "database.db", given, settings)
    (found,) = build_models(tmp_path / "database.db", given, settings, SilentProgress())
    assert pose_errors(found, scene).max() < 0.1
    degrees = across_deg / 2 * np.array([0.2, 0.6, 1.0])
    np.testing.assert_allclose(radii(found, degrees), focal_px * np.radians(degrees), atol=0.5)
