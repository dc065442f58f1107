"""COLMAP's own mappers on databases of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from mast3r_sfm.colmap import other_mappers
from mast3r_sfm.colmap.mapper import MapperSettings
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.colmap.other_mappers import colmap_models
from mast3r_sfm.config import Config
from mast3r_sfm.errors import ReconstructionError
from mast3r_sfm.evaluation.pairs import measure_pairs
from mast3r_sfm.types import PairMatches
from tests.exact import Scene, ring

KINDS = ["global", "incremental"]


def settings(kind: str, *, threads: int = 2, pixel_scale: float = 1.0, seed: int = 0) -> MapperSettings:
    config = Config().with_overrides([f"map.mapper={kind}"]).map
    return MapperSettings(config=config, pixel_scale=pixel_scale, threads=threads, seed=seed)


def noisy(scene: Scene, noise_px: float = 0.5) -> list[PairMatches]:
    """All pairs, with one error per keypoint."""
    rng = np.random.default_rng(3)
    matches = [scene.matches(*pair) for pair in combinations(range(len(scene.poses)), 2)]
    errors = noise_px * rng.normal(size=(len(scene.poses), len(scene.points), 2))
    return [
        replace(
            match,
            xy_first=match.xy_first + errors[match.first][: len(match)],
            xy_second=match.xy_second + errors[match.second][: len(match)],
        )
        for match in matches
    ]


def worst_error(model: ColmapModel, scene: Scene) -> float:
    truth = {f"left/{image:02d}.jpg": pose for image, pose in enumerate(scene.poses)}
    return float(measure_pairs([model.cam_from_world], truth, sorted(model.cam_from_world)).error_deg.max())


@pytest.fixture
def scene() -> Scene:
    """Seven cameras that all see all 300 points."""
    whole = ring(7, turn_deg=120, points=300)
    return replace(whole, points=0.8 * whole.points)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_right(kind: str, scene: Scene, make_database: Callable[..., Path]) -> None:
    """Poses, rigs, frames, keypoints and pairs are read as we mean them; the focal length is found."""
    database = make_database(scene, noisy(scene), focal_factor=1.1)
    (model,) = colmap_models(database, settings(kind))
    assert sorted(model.cam_from_world) == [f"left/{image:02d}.jpg" for image in range(7)]
    assert model.names() == {image: f"left/{image:02d}.jpg" for image in range(7)}
    assert 1e-4 < worst_error(model, scene) < 0.3
    assert 280 <= model.num_points <= 300
    for camera in model.cameras.values():
        assert camera.model == "SIMPLE_RADIAL"
        assert 0.99 < camera.params[0] / scene.focal_px < 1.01
    # Keypoints keep their numbers: refinement writes them back.
    keypoints = model.keypoints()
    with pycolmap.Database.open(str(database)) as opened:
        for image in range(7):
            np.testing.assert_allclose(keypoints[image], np.asarray(opened.read_keypoints(image + 1))[:, :2])
        assert opened.num_verified_image_pairs() == opened.num_matched_image_pairs() == 21
        for i, j in combinations(range(7), 2):
            geometry = opened.read_two_view_geometry(i + 1, j + 1)
            assert geometry.config == pycolmap.TwoViewGeometryConfiguration.CALIBRATED
            assert len(geometry.inlier_matches) == 300


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_model(kind: str, scene: Scene, make_database: Callable[..., Path]) -> None:
    database = make_database(scene, noisy(scene), focal_factor=1.1)
    one, two = (colmap_models(database, settings(kind, threads=threads))[0] for threads in (1, 2))
    for name, pose in one.cam_from_world.items():
        np.testing.assert_array_equal(two.cam_from_world[name], pose)
    assert one.num_points == two.num_points


def test_thresholds_hold_at_the_resolution_of_matching(scene: Scene, make_database: Callable[..., Path]) -> None:
    """Four pixels of matching are sixteen of the photo where four photo pixels made one, and three elsewhere."""
    database = make_database(scene, noisy(scene, 1.5))
    coarse, fine = (colmap_models(database, settings("incremental", pixel_scale=scale))[0] for scale in (4.0, 0.75))
    assert coarse.num_points > 280
    assert 0.5 < len(fine.tracks().point) / len(coarse.tracks().point) < 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_two_places_become_two_models(kind: str, make_database: Callable[..., Path]) -> None:
    scene = ring(9, turn_deg=150, points=300)
    scene = replace(scene, points=0.8 * scene.points)
    groups = range(5), range(5, 9)
    matches = [scene.matches(*pair) for group in groups for pair in combinations(group, 2)]
    models = colmap_models(make_database(scene, matches), settings(kind))
    assert [sorted(model.names()) for model in models] == [list(group) for group in groups]
    for model in models:
        assert worst_error(model, scene) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_without_matches_there_is_no_model(kind: str, make_database: Callable[..., Path]) -> None:
    assert colmap_models(make_database(ring(4), []), settings(kind)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_says_what_to_do(
    kind: str, scene: Scene, make_database: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no way")

    monkeypatch.setattr(other_mappers.pycolmap, f"{kind}_mapping", fail)
    with pytest.raises(ReconstructionError, match=rf"{kind} mapper failed on .*database\.db: no way; use the mapper"):
        colmap_models(make_database(scene), settings(kind))


def test_a_model_restricted_to_some_images(scene: Scene, make_database: Callable[..., Path]) -> None:
    (model,) = colmap_models(make_database(scene), settings("incremental"))
    poses = model.poses()
    few = model.restricted_to([0, 2, 5])
    assert few.names() == {image: f"left/{image:02d}.jpg" for image in (0, 2, 5)}
    assert set(few.tracks().image.tolist()) == {0, 2, 5}
    for image, pose in few.poses().items():
        np.testing.assert_array_equal(pose, poses[image])
    assert few.num_points <= model.num_points
    assert np.bincount(few.tracks().point).min() >= 2
    assert len(model.poses()) == 7  # it is a copy
