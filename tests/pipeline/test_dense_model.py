"""The whole chain with a dense model that errs as much as it is told to, against exact truth."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from mast3r_sfm import pipeline
from mast3r_sfm.colmap.model import ColmapModel, read_model
from mast3r_sfm.config import Config, RunOptions
from mast3r_sfm.evaluation.pairs import PairErrors, measure_pairs
from mast3r_sfm.evaluation.trajectory import measure_trajectory
from mast3r_sfm.summaries import RunReport
from mast3r_sfm.synthetic.oracle import OracleModel, OracleNoise
from mast3r_sfm.synthetic.render import View, make_views
from tests.scenes import photo_folder

NAMES = [f"{number:04d}.jpg" for number in range(5)]


@pytest.fixture(scope="module")
def views() -> dict[str, View]:
    """A façade from five places, small: every pixel is compared with thousands of others."""
    return make_views("facade", 5, width_px=96, height_px=72)


Reconstruct = Callable[..., tuple[ColmapModel, RunReport, OracleModel]]


@pytest.fixture
def run_oracle(views: dict[str, View], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reconstruct:
    """run_oracle(pixel_px=1.0, …): reconstruct with that noise."""

    def call(**noise: float) -> tuple[ColmapModel, RunReport, OracleModel]:
        model = OracleModel(views, OracleNoise(**noise))
        monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: model)
        photos = photo_folder(tmp_path, views)
        report = pipeline.reconstruct(photos, tmp_path / "out", Config(), RunOptions(threads=1))
        return read_model(tmp_path / "out" / "sparse" / "0"), report, model

    return call


def errors(model: ColmapModel, views: dict[str, View]) -> tuple[PairErrors, float]:
    """Errors of pairs, and of the centres over the scene's size."""
    truth = {name: view.cam_from_world for name, view in views.items()}
    trajectory = measure_trajectory(model.cam_from_world, truth, NAMES)
    assert trajectory is not None
    assert trajectory.images == 5
    return measure_pairs([model.cam_from_world], truth, NAMES), trajectory.rmse_of_size


def test_an_exact_model_gives_an_exact_reconstruction(
    run_oracle: Reconstruct, views: dict[str, View], tmp_path: Path
) -> None:
    model, report, _ = run_oracle(log_scale=0.5)
    assert list(model.cam_from_world) == NAMES
    pairs, centres = errors(model, views)
    # Matches lie on whole pixels of a photo 96 pixels wide: half a pixel is a third of a degree.
    assert pairs.rotation_deg.mean() < 0.2
    assert centres < 0.003
    for camera in model.cameras.values():
        assert camera.params[0] == pytest.approx(views[NAMES[0]].K[0, 0], rel=0.03)
    assert report.model == "oracle"
    assert report.left_out == ()
    reconstruction = pycolmap.Reconstruction(str(tmp_path / "out" / "sparse" / "0"))
    for point in reconstruction.points3D.values():
        seen = [element.image_id for element in point.track.elements]
        assert len(seen) == len(set(seen))


def test_noise_and_wrong_pairs_leave_it_accurate(run_oracle: Reconstruct, views: dict[str, View]) -> None:
    model, report, oracle = run_oracle(pixel_px=0.5, depth_relative=0.01, log_scale=0.5, outlier_pairs=0.2)
    wrong = [pair for pair in combinations(NAMES, 2) if oracle.is_outlier(*pair)]
    assert 1 <= len(wrong) <= 3
    assert list(model.cam_from_world) == NAMES
    pairs, centres = errors(model, views)
    # Half a pixel of noise is a third of a degree here.
    assert 0.01 < pairs.rotation_deg.mean() < 0.3
    assert 0.01 < pairs.translation_deg.mean() < 0.5
    assert 1e-5 < centres < 0.005
    assert report.num_registered == 5
    assert np.isfinite(model.summary("").mean_reprojection_error_px)
