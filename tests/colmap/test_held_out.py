"""Principal points are judged by observations that they were not fitted to."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from mast3r_sfm.colmap import principal_point
from mast3r_sfm.colmap.held import Held
from mast3r_sfm.colmap.held_out import gains_of_shifts
from mast3r_sfm.colmap.mapper import Mapper
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.colmap.sample import thinned
from tests.colmap.test_mapper import NUMBER, arc, errors, middle, noisy, nudged, settings

MakeDatabase = Callable[..., Path]


def shifted_database(make_database: MakeDatabase, shift_px: float, seed: int, noise_px: float = 0.5) -> Path:
    scene = arc()
    noise = noise_px * np.random.default_rng(seed).normal(size=(NUMBER, 250, 2)) + [shift_px, 0.0]
    return make_database(scene, [noisy(scene, *pair, noise) for pair in combinations(range(NUMBER), 2)])


def bundle() -> pycolmap.BundleAdjustmentOptions:
    options = pycolmap.BundleAdjustmentOptions()
    options.print_summary = False
    options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
    options.ceres.solver_options.num_threads = 1
    options.ceres.solver_options.function_tolerance = 1e-6
    return options


def centred(model: ColmapModel) -> pycolmap.Reconstruction:
    """A sample of a model, whose principal points are brought to the middle."""
    sample = thinned(model.reconstruction, model.tracks())
    for camera in sample.cameras.values():
        camera.principal_point_x, camera.principal_point_y = camera.width / 2, camera.height / 2
    return sample


@pytest.mark.parametrize(("shift_px", "least", "most"), [(12.0, 0.015, 0.5), (0.0, -0.05, 0.01)])
def test_a_shift_pays_where_there_is_one(
    make_database: MakeDatabase, shift_px: float, least: float, most: float
) -> None:
    gains = []
    for seed in range(3):
        model = Mapper(shifted_database(make_database, shift_px, seed), settings()).build(nudged(arc(), range(NUMBER)))
        sample = centred(model)
        before = [list(camera.params) for camera in sample.cameras.values()]
        found = gains_of_shifts(sample, bundle(), Held(), [1])
        assert [list(camera.params) for camera in sample.cameras.values()] == before
        assert list(found) == [1]
        gains.append(found[1])
    assert least < min(gains)
    assert max(gains) < most
    if not shift_px:
        assert np.mean(gains) < 0  # what is fitted to noise explains other noise worse


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("shift_px", [0.0, 12.0])
def test_only_what_explains_other_points_is_taken(
    make_database: MakeDatabase, monkeypatch: pytest.MonkeyPatch, shift_px: float, rough: bool
) -> None:
    mapper = Mapper(shifted_database(make_database, shift_px, 1, 0.3), settings())
    model = mapper.build(nudged(arc(), range(NUMBER)), rough=rough)
    if shift_px:
        assert middle(model)[0] == pytest.approx(shift_px, abs=3)
    else:
        assert middle(model).tolist() == [0.0, 0.0]
    assert errors(model, arc()).error_deg.max() < 0.3
    # No worse but for the noise of the draw is enough.
    for gain, is_taken in ((-0.0005, bool(shift_px)), (-0.001, False)):
        monkeypatch.setattr(
            "mast3r_sfm.colmap.mapper.gains_of_shifts", lambda *given, g=gain: dict.fromkeys(given[3], g)
        )
        assert middle(mapper.build(nudged(arc(), range(NUMBER)), rough=rough)).any() == is_taken


@pytest.mark.parametrize(
    ("shift_px", "sigma_px", "is_significant"),
    [
        (3.0, 1.1, False),  # 7.4 against 9.2
        (3.0, 0.9, True),  # 11.1
        (25.0, 6.5, False),  # 14.8 would do for a small shift; so far off, noise and outliers are likelier than a lens
        (25.0, 4.0, True),  # 39 against 21.8
        (120.0, 1.0, False),  # no lens at all
        (3.0, 12.0, False),
    ],
)
def test_far_shifts_need_more_evidence(shift_px: float, sigma_px: float, is_significant: bool) -> None:
    camera = pycolmap.Camera(model="SIMPLE_RADIAL", width=1000, height=700, params=[900, 500 + shift_px, 350, 0.0])
    covariance = np.diag([100.0, sigma_px**2, sigma_px**2, 1e-4])
    assert principal_point._is_significant(camera, covariance) == is_significant
