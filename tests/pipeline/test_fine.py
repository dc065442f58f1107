"""The whole chain with photos three times as large as what the model sees: `--resolution fine` uses all of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mast3r_sfm import pipeline
from mast3r_sfm.colmap.model import ColmapModel, read_model
from mast3r_sfm.config import Config, RunOptions
from mast3r_sfm.errors import ConfigError
from mast3r_sfm.evaluation.pairs import measure_pairs
from mast3r_sfm.evaluation.trajectory import measure_trajectory
from mast3r_sfm.matching import rounds
from mast3r_sfm.summaries import RunReport
from mast3r_sfm.synthetic.oracle import OracleModel, OracleNoise
from mast3r_sfm.synthetic.render import View, make_views
from mast3r_sfm.synthetic.scenes import make_scene
from mast3r_sfm.types import Encoding, PairPrediction
from tests.exact import Listener
from tests.scenes import photo_folder

TIMES, WIDTH_PX, HEIGHT_PX = 3, 64, 48
NAMES = [f"{number:04d}.jpg" for number in range(3)]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    output: Path
    report: RunReport

    @property
    def model(self) -> ColmapModel:
        return read_model(self.output / "sparse" / "0")

    @property
    def keys(self) -> dict[str, str]:
        return {stage.stage: stage.key for stage in self.report.stages}

    @property
    def resumed(self) -> int:
        """Finished chunks of pairs found."""
        return {stage.stage: stage.resumed for stage in self.report.stages}["match"]

    @property
    def matches(self) -> list[dict[str, NDArray[Any]]]:
        """What the match stage left on disk, chunk after chunk."""
        return stored_matches(self.output)


def stored_matches(output: Path) -> list[dict[str, NDArray[Any]]]:
    return [load_file(path) for path in sorted((output / "cache" / "match").rglob("*.safetensors"))]


@pytest.fixture(scope="module")
def views() -> dict[str, View]:
    """What the oracle sees of the photos."""
    return make_views("facade", len(NAMES), width_px=WIDTH_PX, height_px=HEIGHT_PX)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    large = make_views("facade", len(NAMES), width_px=TIMES * WIDTH_PX, height_px=TIMES * HEIGHT_PX, samples=1)
    return photo_folder(tmp_path_factory.mktemp("photos"), large)


@pytest.fixture(scope="module")
def run_oracle(views: dict[str, View], photos: Path) -> Callable[..., Run]:
    """run_oracle(output, "fine", fail_after=50): reconstruct at that resolution, to a failure of the model."""

    def call(output: Path, resolution: str, fail_after: int | None = None) -> Run:
        model = OracleModel(views, OracleNoise(pixel_px=0.3), scene=make_scene("facade"))
        predict, calls = model.predict, count()

        def predict_or_fail(
            pairs: Sequence[tuple[Encoding, Encoding]],
        ) -> Iterator[tuple[int, PairPrediction, PairPrediction]]:
            if next(calls) == fail_after:
                raise KeyboardInterrupt
            return predict(pairs)

        model.predict = predict_or_fail  # type: ignore[method-assign]
        # Refinement by patches would hide where matching left the observations.
        config = Config().with_overrides([f"match.resolution={resolution}", "map.refine=false"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rounds, "PAIRS_PER_CHUNK", 1)
            patch.setattr(pipeline, "load_model", lambda *_, **__: model)
            report = pipeline.reconstruct(photos, output, config, RunOptions(device="cpu", threads=1))
        return Run(output=output, report=report)

    return call


@pytest.fixture(scope="module")
def coarse(run_oracle: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_oracle(tmp_path_factory.mktemp("coarse"), "coarse")


@pytest.fixture(scope="module")
def fine(run_oracle: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_oracle(tmp_path_factory.mktemp("fine"), "fine")


def errors(model: ColmapModel, views: dict[str, View]) -> tuple[float, float, float]:
    """Mean angles of rotations and of directions in degrees, and of the centres over the scene's size."""
    assert list(model.cam_from_world) == NAMES
    truth = {name: view.cam_from_world for name, view in views.items()}
    pairs = measure_pairs([model.cam_from_world], truth, NAMES)
    trajectory = measure_trajectory(model.cam_from_world, truth, NAMES)
    assert trajectory is not None
    return float(pairs.rotation_deg.mean()), float(pairs.translation_deg.mean()), trajectory.rmse_of_size


def test_fine_matches_give_better_poses(coarse: Run, fine: Run, views: dict[str, View]) -> None:
    before, after = errors(coarse.model, views), errors(fine.model, views)
    assert after[0] < min(0.2, 0.6 * before[0])
    assert after[1] < min(0.2, 0.6 * before[1])
    summaries = [run.model.summary("") for run in (coarse, fine)]
    assert 0.1 < summaries[1].mean_reprojection_error_px < 0.5 * summaries[0].mean_reprojection_error_px
    assert summaries[1].points > summaries[0].points
    # Fine matches lie on the pixels of the photos.
    for matches in fine.matches:
        assert matches["has_points"].all()
        assert 1000 < len(matches["xy_first"]) <= 2 * 4096
        np.testing.assert_allclose(TIMES * matches["xy_first"] % 1, 0.5, atol=1e-6)


def test_resolution_is_a_part_of_the_key_and_said(coarse: Run, fine: Run) -> None:
    assert coarse.keys["pairs"] == fine.keys["pairs"]
    assert coarse.keys["match"] != fine.keys["match"]
    note = "matching: pairs of large photos once more in windows, at full resolution"
    assert note in fine.report.notes
    assert note not in coarse.report.notes


def test_an_interrupted_run_ends_with_the_same_matches(
    fine: Run, run_oracle: Callable[..., Run], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_oracle(tmp_path, "fine", fail_after=30)
    done = len(stored_matches(tmp_path))
    assert 0 < done < len(fine.matches) == 3
    again = run_oracle(tmp_path, "fine")
    assert again.resumed == done
    assert again.keys == fine.keys
    for one, other in zip(fine.matches, again.matches, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_auto_is_coarse_on_a_cpu(coarse: Run, run_oracle: Callable[..., Run], tmp_path: Path) -> None:
    again = run_oracle(shutil.copytree(coarse.output, tmp_path / "out"), "auto")
    assert again.keys == coarse.keys
    assert again.resumed == 3
    assert again.report.config["match"]["resolution"] == "auto"  # type: ignore[index]


def test_keypoints_have_no_windows(photos: Path, tmp_path: Path) -> None:
    config = Config().with_overrides(["encode.model=xfeat", "match.resolution=fine"])
    with pytest.raises(ConfigError, match=r"xfeat finds keypoints .*encode\.max_size_px"):
        pipeline.reconstruct(photos, tmp_path / "out", config, RunOptions(device="cpu", threads=1), Listener())
    assert not (tmp_path / "out" / "cache").exists()
