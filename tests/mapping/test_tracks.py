"""How long tracks are, against the number of images that truly see their points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mast3r_sfm import pipeline
from mast3r_sfm.colmap.mapper import MapperSettings
from mast3r_sfm.colmap.model import read_model
from mast3r_sfm.config import Config, MapConfig, RunOptions
from mast3r_sfm.evaluation.pairs import measure_pairs
from mast3r_sfm.mapping.stage import MapInput, build_models, write_matches
from mast3r_sfm.synthetic.cameras import Kind
from mast3r_sfm.synthetic.covisibility import correspond
from mast3r_sfm.synthetic.oracle import OracleModel, OracleNoise
from mast3r_sfm.synthetic.render import View, make_views
from mast3r_sfm.types import AlignmentResult, Float64, Tracks
from tests.exact import Listener, ring
from tests.scenes import photo_folder

TimesSeen = Callable[[int, Float64], Float64]
"""In how many images that is seen which an image shows at pixels [M, 2]."""


def database_tracks(path: Path) -> Tracks:
    """What the matches of a database hold together: keypoints with none are left out; the points are not known."""
    with pycolmap.Database.open(str(path)) as database:
        number = database.num_images()
        xy = [np.asarray(database.read_keypoints(image + 1), np.float64)[:, :2] for image in range(number)]
        start = np.cumsum([0, *map(len, xy)])
        links = [
            np.asarray(database.read_matches(i + 1, j + 1), np.int64) + start[[i, j]]
            for i, j in combinations(range(number), 2)
            if database.exists_matches(i + 1, j + 1)
        ]
    ends = np.concatenate(links)
    shape = (int(start[-1]),) * 2
    track = connected_components(coo_array((np.ones(len(ends)), ends.T), shape=shape), directed=False)[1]
    kept = np.flatnonzero(np.bincount(track)[track] > 1)
    point = np.unique(track[kept], return_inverse=True)[1]
    image = np.repeat(np.arange(number), [len(one) for one in xy])[kept]
    points = np.zeros((point.max() + 1, 3))
    return Tracks(points=points, point=point, image=image, keypoint=kept - start[image], xy=np.concatenate(xy)[kept])


def share_of_true_length(tracks: Tracks, times_seen: TimesSeen) -> float:
    """Mean length of tracks over the mean number of images that see what they show."""
    length = np.bincount(tracks.point)
    seen = np.empty(len(tracks.point))
    for image in np.unique(tracks.image):
        mine = tracks.image == image
        seen[mine] = times_seen(int(image), tracks.xy[mine])
    return float(length.mean() / (np.bincount(tracks.point, seen) / length).mean())


def assert_once(tracks: Tracks) -> None:
    """No track holds two observations of one image."""
    assert len(np.unique(np.stack([tracks.point, tracks.image]), axis=1).T) == len(tracks.point)


def test_tracks_of_exact_matches_are_as_long_as_can_be(tmp_path: Path) -> None:
    """With noise of each pair's own that is less than the radius."""
    scene = ring(6, turn_deg=110, points=160)
    scene = replace(scene, points=1.7 * scene.points)  # not all images see all
    rng = np.random.default_rng(0)
    matches = []
    for pair in combinations(range(6), 2):
        match = scene.matches(*pair)
        noise = rng.uniform(-0.25, 0.25, (2, len(match), 2))
        matches.append(replace(match, xy_first=match.xy_first + noise[0], xy_second=match.xy_second + noise[1]))
    part = AlignmentResult(
        images=np.arange(6, dtype=np.int32),
        edges=np.arange(15, dtype=np.int32),
        cam_from_world=scene.poses,
        residual_deg=np.zeros(6),
        history=(0.0,),
        stop_reason="exact",
    )
    names = [f"{image:02d}.jpg" for image in range(6)]
    given = MapInput(names=names, rig=scene.rig(), matches=matches, parts=[part])
    settings = MapperSettings(config=MapConfig(), pixel_scale=1.0, threads=1, seed=0)
    count = np.sum([scene.sees(image) for image in range(6)], axis=0)
    assert 4 < count.mean() < 5.9

    def times_seen(image: int, xy: Float64) -> Float64:
        distance = np.linalg.norm(scene.project(image)[None] - xy[:, None], axis=2)
        assert distance.min(axis=1).max() < 1
        nearest: Float64 = count[distance.argmin(axis=1)].astype(np.float64)
        return nearest

    write_matches(tmp_path / "database.db", given, settings)
    tracks = database_tracks(tmp_path / "database.db")
    assert_once(tracks)
    assert 0.97 < share_of_true_length(tracks, times_seen) <= 1
    assert 0.95 < len(tracks.points) / (count > 1).sum() < 1.03
    (model,) = build_models(tmp_path / "database.db", given, settings, Listener())
    assert_once(model.tracks())
    assert 0.97 < share_of_true_length(model.tracks(), times_seen) <= 1
    assert 0.95 < model.num_points / (count > 1).sum() < 1.03


@lru_cache
def scene_views(kind: Kind) -> Mapping[str, View]:
    """A façade from five places, or things on a pedestal from all around."""
    width_px, number = (96, 5) if kind == "facade" else (128, 6)
    return make_views(kind, number, width_px=width_px, height_px=width_px * 3 // 4)


def true_count(views: Mapping[str, View]) -> TimesSeen:
    """In how many of the views each pixel's surface is seen."""
    names = sorted(views)
    count = [1 + sum(correspond(views[one], views[two])[1] for two in names if two != one) for one in names]

    def times_seen(image: int, xy: Float64) -> Float64:
        height, width = count[image].shape
        column, row = (xy.astype(np.int64).clip(0, [width - 1, height - 1])).T
        seen: Float64 = count[image][row, column].astype(np.float64)
        return seen

    return times_seen


@pytest.mark.parametrize(
    ("kind", "pixel_px", "least", "turn_deg"),
    [("facade", 0.0, 0.9, 0.15), ("facade", 1.0, 0.9, 1.0), ("object", 1.0, 0.8, 0.3)],
)
def test_tracks_of_a_dense_model_are_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, pixel_px: float, least: float, turn_deg: float
) -> None:
    """The noise is of each pair's own, at both ends: more than the radius within which keypoints are one."""
    views = scene_views(kind)
    oracle = OracleModel(views, OracleNoise(pixel_px=pixel_px))
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: oracle)
    pipeline.reconstruct(photo_folder(tmp_path, views), tmp_path / "out", Config(), RunOptions(threads=1))
    model = read_model(tmp_path / "out" / "sparse" / "0")
    mapped = model.tracks()
    assert_once(mapped)
    assert len(mapped.points) > 1000
    assert least < share_of_true_length(mapped, true_count(views)) < 1.05
    truth = {name: view.cam_from_world for name, view in views.items()}
    errors = measure_pairs([model.cam_from_world], truth, sorted(views))
    assert errors.rotation_deg.mean() < turn_deg
