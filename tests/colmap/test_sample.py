"""A sample of the tracks stands for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from mast3r_sfm.colmap import sample as sampling
from mast3r_sfm.colmap.mapper import Mapper
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.colmap.sample import place_points, spread_points, take_over, thinned
from mast3r_sfm.types import Tracks
from tests.colmap.test_mapper import NUMBER, arc, errors, nudged, settings

MakeDatabase = Callable[..., Path]


def tracks_of(point: list[int], image: list[int], xy: list[tuple[float, float]]) -> Tracks:
    return Tracks(
        points=np.zeros((max(point) + 1, 3)),
        point=np.array(point),
        image=np.array(image),
        keypoint=np.arange(len(point)),
        xy=np.array(xy, np.float64),
    )


def test_each_cell_gives_its_longest_track_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LEAST", 3)
    monkeypatch.setattr(sampling, "PER_IMAGE", 1)
    # Points 0 and 1 lie in one cell of image 0, where 1 is seen three times; point 2 is alone in its own.
    tracks = tracks_of(
        [0, 0, 1, 1, 1, 2, 2], [0, 1, 0, 1, 2, 0, 2], [(1, 1), (1, 1), (2, 2), (2, 2), (2, 2), (90, 90), (90, 90)]
    )
    sizes = np.full((3, 2), 100.0)
    assert spread_points(tracks, sizes).tolist() == [1, 2]
    monkeypatch.setattr(sampling, "LEAST", 6)
    assert spread_points(tracks, sizes).tolist() == [0, 1, 2]


@pytest.mark.parametrize("least", [200, 600, 10_000])
def test_a_sample_is_as_large_as_asked_for_and_all_over_the_photos(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    monkeypatch.setattr(sampling, "LEAST", least)
    monkeypatch.setattr(sampling, "PER_IMAGE", 1)
    rng = np.random.default_rng(0)
    point, image = (part.ravel().tolist() for part in np.meshgrid(np.arange(800), np.arange(4), indexing="ij"))
    tracks = tracks_of(point, image, list(map(tuple, rng.uniform(0, 100, (3200, 2)))))
    chosen = spread_points(tracks, np.full((4, 2), 100.0))
    if least > 3200:
        assert chosen.tolist() == list(range(800))
        return
    # Equal lengths: all cells give as many, and a round of them is 4 × 64 points at most.
    assert least <= 4 * len(chosen) <= least + 4 * 256
    mine = np.isin(tracks.point, chosen) & (tracks.image == 2)
    counts = np.histogram2d(*tracks.xy[mine].T, bins=4, range=[[0, 100], [0, 100]])[0]
    assert counts.min() > 0


def test_nothing_to_choose_from() -> None:
    nothing = Tracks(
        points=np.zeros((0, 3)),
        point=np.zeros(0, np.int64),
        image=np.zeros(0, np.int64),
        keypoint=np.zeros(0, np.int64),
        xy=np.zeros((0, 2)),
    )
    assert len(spread_points(nothing, np.zeros((1, 2)))) == 0
    place_points(pycolmap.Reconstruction(), nothing, 1.0)


def test_poses_of_a_sample_place_all_points(make_database: MakeDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LEAST", 300)
    monkeypatch.setattr(sampling, "PER_IMAGE", 1)
    scene = arc()
    model = Mapper(make_database(scene), settings()).build(nudged(scene, range(NUMBER)))
    before = model.tracks()
    few = thinned(model.reconstruction, before)
    assert 50 <= few.num_points3D() < 0.8 * model.num_points
    assert len(model.tracks().points) == model.num_points == len(before.points)  # the model is left alone
    away = pycolmap.Reconstruction(model.reconstruction)
    for number in away.reg_image_ids():
        frame = away.frame(away.image(number).frame_id)
        frame.rig_from_world = pycolmap.Rigid3d(pycolmap.Rotation3d(), np.array([9.0, 9.0, number]))
    for point in away.points3D.values():
        point.xyz = point.xyz + 0.05
    take_over(away, few)
    place_points(away, before, 1.0)
    found = ColmapModel(away)
    assert errors(found, scene).error_deg.max() == pytest.approx(errors(model, scene).error_deg.max(), abs=1e-9)
    np.testing.assert_allclose(found.tracks().points, before.points, atol=1e-3)
