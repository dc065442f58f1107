"""Standard deviations of poses: right against the spread over many noises, and the same in every frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from mast3r_sfm.colmap import uncertainty
from mast3r_sfm.colmap.mapper import Mapper, MapperSettings
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.colmap.principal_point import is_centred
from mast3r_sfm.colmap.uncertainty import pose_sigmas
from mast3r_sfm.config import MapConfig
from mast3r_sfm.geometry.rigid import camera_centre
from mast3r_sfm.geometry.similarity import align_similarity
from mast3r_sfm.types import Float64, PairMatches
from tests.exact import Scene, ring

SETTINGS = MapperSettings(config=MapConfig(), pixel_scale=1.0, threads=1, seed=0)
MakeDatabase = Callable[..., Path]


@pytest.fixture
def scene() -> Scene:
    """Seven cameras that all see all points."""
    whole = ring(7, turn_deg=120, points=150)
    return replace(whole, points=0.8 * whole.points)


def noisy(scene: Scene, noise_px: float, seed: int, *, blind: int = -1) -> list[PairMatches]:
    """All pairs, with one error per keypoint; one image sees only the first 25 points."""
    rng = np.random.default_rng(seed)
    errors = noise_px * rng.normal(size=(len(scene.poses), len(scene.points), 2))
    found = []
    for i, j in combinations(range(len(scene.poses)), 2):
        match = scene.matches(i, j)
        seen = np.arange(len(match)) < (25 if blind in (i, j) else len(match))
        fields = ("xy_first", "xy_second", "confidence", "points_first", "points_second")
        some = {name: getattr(match, name)[seen] for name in fields}
        some["xy_first"] = some["xy_first"] + errors[i][: len(match)][seen]
        some["xy_second"] = some["xy_second"] + errors[j][: len(match)][seen]
        found.append(replace(match, **some))
    return found


def build(database: Path, scene: Scene) -> ColmapModel:
    return Mapper(database, SETTINGS).build(dict(enumerate(scene.poses)))


def misses(model: ColmapModel, scene: Scene) -> Float64:
    """[n, 2] rotation in degrees and position over the largest distance, by which each image misses the truth, in the
    frame in which all of them together miss it least."""
    poses = np.array([pose for _, pose in sorted(model.poses().items())])
    placed, true = camera_centre(poses), camera_centre(scene.poses)
    extent = np.linalg.norm(true[:, None] - true[None], axis=-1).max()
    fit = align_similarity(placed, true)

    def miss(frame: Float64) -> Float64:
        turn = Rotation.from_rotvec(frame[:3]).as_matrix() @ fit.rotation
        turned = Rotation.from_matrix(poses[:, :, :3] @ turn.T @ scene.poses[:, :, :3].transpose(0, 2, 1)).as_rotvec()
        moved = fit.scale * np.exp(frame[6]) * placed @ turn.T + fit.translation + frame[3:6]
        return np.concatenate([turned, (moved - true) / extent], axis=1)

    frame = least_squares(lambda frame: miss(frame).ravel(), np.zeros(7)).x
    rotation, position = np.linalg.norm(miss(frame).reshape(-1, 2, 3), axis=2).T
    return np.stack([np.degrees(rotation), position], axis=1)


@pytest.mark.parametrize("blind", [-1, 3])
def test_sigmas_are_the_spread_over_noises(scene: Scene, make_database: MakeDatabase, blind: int) -> None:
    """To a factor of 1.5, for every image; also for one that sees a sixth of the points, which is the worst."""
    found, sigmas = [], []
    for seed in range(16):
        model = build(make_database(scene, noisy(scene, 0.7, seed, blind=blind)), scene)
        if not is_centred(model.reconstruction.camera(1)):
            continue  # one in ninety by chance, and by more than any sigma
        found.append(misses(model, scene))
        sigma = pose_sigmas(model)
        assert sigma is not None
        assert list(sigma) == list(range(7))
        sigmas.append(list(sigma.values()))
    assert len(found) >= 14
    spread = np.sqrt((np.array(found) ** 2).mean(axis=0))
    ratio = np.mean(sigmas, axis=0) / spread
    assert ratio.min() > 1 / 1.5
    assert ratio.max() < 1.5
    if blind >= 0:
        assert np.mean(sigmas, axis=0).argmax(axis=0).tolist() == [blind, blind]


def test_the_frame_does_not_matter(scene: Scene, make_database: MakeDatabase) -> None:
    model = build(make_database(scene, noisy(scene, 0.5, 0)), scene)
    before = pose_sigmas(model)
    turned = pycolmap.Reconstruction(model.reconstruction)
    turn = pycolmap.Rotation3d(np.array([0.1, 0.7, -0.2, 0.6]) / np.linalg.norm([0.1, 0.7, -0.2, 0.6]))
    turned.transform(pycolmap.Sim3d(7.0, turn, np.array([40.0, -3.0, 9.0])))
    after = pose_sigmas(ColmapModel(turned))
    assert before is not None
    assert after is not None
    np.testing.assert_allclose(list(after.values()), list(before.values()), rtol=1e-3)


def test_twice_the_noise_is_twice_the_sigma(scene: Scene, make_database: MakeDatabase) -> None:
    one, two = (pose_sigmas(build(make_database(scene, noisy(scene, noise, 0)), scene)) for noise in (0.3, 0.6))
    assert one is not None
    assert two is not None
    ratio = np.array(list(two.values())) / np.array(list(one.values()))
    assert 1.8 < ratio.min() <= ratio.max() < 2.2


def test_without_sigmas(scene: Scene, make_database: MakeDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many images, and too few observations."""
    model = build(make_database(scene, noisy(scene, 0.5, 0)), scene)
    assert pose_sigmas(model.restricted_to([2])) is None
    assert pose_sigmas(ColmapModel(pycolmap.Reconstruction())) is None
    monkeypatch.setattr(uncertainty, "MAX_IMAGES", 6)
    assert pose_sigmas(model) is None
