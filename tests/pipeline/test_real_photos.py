"""Real photos with surveyed truth; skipped where they are not at hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.colmap.model import read_model
from mast3r_sfm.config import Config, RunOptions
from mast3r_sfm.errors import ReconstructionError
from mast3r_sfm.evaluation.metrics import compare
from mast3r_sfm.evaluation.truth import read_truth_json
from mast3r_sfm.geometry.rigid import angle_between_rotations
from mast3r_sfm.pipeline import reconstruct
from mast3r_sfm.report import read_report

OPTIONS = RunOptions(device="cpu", threads=2)


def photo_set(data_dir: Path, name: str) -> Path:
    folder = data_dir / name
    if not folder.is_dir():
        pytest.skip(f"the photo set {name} is not in {data_dir}")
    return folder


def test_a_fountain(data_dir: Path, tmp_path: Path) -> None:
    photos = photo_set(data_dir, "strecha_fountain_p11")
    report = reconstruct(photos / "images", tmp_path, Config(), OPTIONS)
    assert report.num_registered == report.num_images == 11
    assert len(report.models) == 1
    models = [read_model(tmp_path / "sparse" / "0").cam_from_world]
    comparison = compare(models, read_truth_json(photos / "gt.json"))
    assert comparison.registered_in_largest == 11
    assert 0.92 <= comparison.auc[5] < 1
    assert comparison.rotation_accuracy[5] == 1
    assert report.models[0].mean_reprojection_error_px < 1.5
    assert report.models[0].points > 2000


def test_a_camera_that_only_turned(data_dir: Path, tmp_path: Path) -> None:
    photos = photo_set(data_dir, "synth_pure_rotation_b")
    with pytest.raises(ReconstructionError, match=r"pure rotation: 12 photos .* different positions"):
        reconstruct(photos / "images", tmp_path, Config(), OPTIONS)
    assert "pure rotation" in read_report(tmp_path)["error"]
    assert not list((tmp_path / "sparse").glob("*/images.bin"))
    (part,) = json.loads((tmp_path / "rotations.json").read_text())["parts"]
    assert part["kind"] == "pure rotation"
    truth = read_truth_json(photos / "gt.json").cam_from_world
    assert [photo["name"] for photo in part["photos"]] == sorted(truth)
    turned = np.array([photo["cam_from_world_rotation"] for photo in part["photos"]])
    exact = np.array([truth[photo["name"]][:, :3] for photo in part["photos"]])
    first, second = np.triu_indices(12, 1)
    relative = [rotations[second] @ rotations[first].transpose(0, 2, 1) for rotations in (turned, exact)]
    missed = np.degrees(angle_between_rotations(relative[0], relative[1]))
    assert 1e-4 < missed.max() < 0.1
    assert part["photos"][0]["focal_px"] == pytest.approx(1500, rel=0.005)
    assert all(1e-4 < photo["sigma_deg"] < 0.05 for photo in part["photos"])
