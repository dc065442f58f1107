"""Known cameras and poses through the whole chain, with a model that brings its own depth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm import pipeline
from mast3r_sfm.colmap.model import ColmapModel, read_model
from mast3r_sfm.config import Config, RunOptions
from mast3r_sfm.errors import InputError
from mast3r_sfm.existing import register, triangulate
from mast3r_sfm.geometry.rigid import angle_between_rotations, camera_centre
from mast3r_sfm.summaries import RunReport
from mast3r_sfm.synthetic.oracle import OracleModel, OracleNoise
from mast3r_sfm.synthetic.render import View, make_views
from tests.scenes import photo_folder

NAMES = [f"{number:04d}.jpg" for number in range(5)]


@pytest.fixture(scope="module")
def views() -> dict[str, View]:
    return make_views("facade", 5, width_px=96, height_px=72)


@pytest.fixture
def place(views: dict[str, View], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images/ and gt.json, whose photos are matched by the oracle."""
    model = OracleModel(views, OracleNoise(pixel_px=0.3, log_scale=0.5))
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: model)
    photo_folder(tmp_path, views)
    return tmp_path


Run = Callable[..., tuple[ColmapModel, RunReport]]


@pytest.fixture
def run(place: Path) -> Run:
    """run("known.intrinsics=…"): reconstruct with settings."""

    def call(*settings: str) -> tuple[ColmapModel, RunReport]:
        config = Config().with_overrides(settings)
        report = pipeline.reconstruct(place / "images", place / "out", config, RunOptions(threads=1))
        return read_model(place / "out" / "sparse" / "0"), report

    return call


def part_of_truth(place: Path, names: list[str]) -> Path:
    images = json.loads((place / "gt.json").read_text(encoding="utf-8"))["images"]
    path = place / "part.json"
    path.write_text(json.dumps({"images": {name: images[name] for name in names}}), encoding="utf-8")
    return path


def worst(model: ColmapModel, views: dict[str, View]) -> tuple[float, float]:
    """Largest errors of rotation in degrees and of position, in the frame of the truth."""
    poses = np.array([model.cam_from_world[name] for name in NAMES])
    true = np.array([views[name].cam_from_world for name in NAMES])
    turn = np.degrees(angle_between_rotations(poses[:, :, :3], true[:, :, :3])).max()
    return float(turn), float(np.linalg.norm(camera_centre(poses) - camera_centre(true), axis=1).max())


@pytest.mark.parametrize("mode", ["fixed", "prior"])
def test_known_cameras_and_poses_of_some(mode: str, run: Run, place: Path, views: dict[str, View]) -> None:
    part = part_of_truth(place, NAMES[1:4])
    model, report = run(f"known.poses={part}", f"known.poses_mode={mode}", f"known.intrinsics={place / 'gt.json'}")
    assert report.num_registered == 5
    size = np.ptp([camera_centre(view.cam_from_world) for view in views.values()], axis=0).max()
    turn, shift = worst(model, views)
    # Half a pixel of a photo 96 pixels wide is a third of a degree.
    assert turn < 0.3
    assert shift < 0.01 * size
    errors = [np.abs(model.cam_from_world[name] - views[name].cam_from_world).max() for name in NAMES]
    assert (max(errors[1:4]) < 1e-9) == (mode == "fixed")
    assert min(errors[0], errors[4]) > 1e-6
    assert any("3 of 3 photos with a known pose" in note for note in report.notes)
    for camera in model.cameras.values():
        assert camera.model == "PINHOLE"
        np.testing.assert_allclose(camera.params, views[NAMES[0]].K[[0, 1, 0, 1], [0, 1, 2, 2]], rtol=0, atol=1e-9)


def test_stages_say_what_contradicts(run: Run, place: Path) -> None:
    data = json.loads((place / "gt.json").read_text(encoding="utf-8"))
    images = data["images"]
    images[NAMES[0]]["R"], images[NAMES[4]]["R"] = images[NAMES[4]]["R"], images[NAMES[0]]["R"]
    images[NAMES[0]]["t"], images[NAMES[4]]["t"] = images[NAMES[4]]["t"], images[NAMES[0]]["t"]
    (place / "swapped.json").write_text(json.dumps(data), encoding="utf-8")
    _, report = run(f"known.poses={place / 'swapped.json'}")
    counts = next(stage.counts for stage in report.stages if stage.stage == "align")
    # The seven pairs of the two photos that were swapped; the other three are right.
    assert counts["contradict known poses"] == 7
    assert len(report.rejected_pairs) == 7
    (warning,) = [text for stage in report.stages for text in stage.warnings if "contradict" in text]
    assert "7 of 10 verified pairs" in warning


def test_triangulate_and_register(place: Path, views: dict[str, View]) -> None:
    options = RunOptions(threads=1)
    report = triangulate(place / "images", part_of_truth(place, NAMES[:3]), place / "first", Config(), options)
    first = read_model(place / "first" / "sparse" / "0")
    assert list(first.cam_from_world) == NAMES[:3]
    assert [left.name for left in report.left_out] == NAMES[3:]
    report = register(place / "images", place / "first" / "sparse" / "0", place / "second", Config(), options)
    second = read_model(place / "second" / "sparse" / "0")
    assert list(second.cam_from_world) == NAMES
    for name in NAMES[:3]:
        np.testing.assert_array_equal(second.cam_from_world[name], first.cam_from_world[name])
    turn, _ = worst(second, views)
    assert turn < 0.4
    assert any(f"2 more placed in their frame: {NAMES[3]}, {NAMES[4]}" in note for note in report.notes)
    with pytest.raises(InputError, match="tells 0 poses"):
        register(place / "images", place / "first" / "sparse" / "0" / "cameras.bin", place / "third", Config(), options)
