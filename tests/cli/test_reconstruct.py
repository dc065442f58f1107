"""`reconstruct` on photos: the result against the truth, twice the same, resumed after it was killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mast3r_sfm.evaluation.metrics import compare
from mast3r_sfm.evaluation.truth import truth_from_poses
from mast3r_sfm_cli.compare import read_poses

Command = Callable[..., Any]


def report_of(output: Path) -> Any:
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def assert_same_result(first: Path, second: Path) -> None:
    """Same images, points and tracks; poses within 1e-6 of the scene size."""
    assert report_of(first)["models"] == report_of(second)["models"]
    (ours,), (theirs,) = read_poses(first), read_poses(second)
    assert list(ours) == list(theirs)
    centres = np.array([-pose[:, :3].T @ pose[:, 3] for pose in ours.values()])
    size = np.linalg.norm(np.ptp(centres, axis=0))
    for name, pose in ours.items():
        np.testing.assert_allclose(pose[:, :3], theirs[name][:, :3], atol=1e-6)
        np.testing.assert_allclose(pose[:, 3], theirs[name][:, 3], atol=1e-6 * size)


def test_the_summary_of_a_good_run(finished_run: Any, photo_folder: Path) -> None:
    number = len(list(photo_folder.iterdir()))
    out = finished_run.result.out
    assert out.startswith(f"{number} of {number} images registered in 1 model\n")
    for part in ("mean track length", "reprojection error", "prepare ", "export ", "model: xfeat"):
        assert part in out
    assert finished_run.result.err == ""


def test_the_poses_are_good(finished_run: Any, example: Path, run_command: Command) -> None:
    found = run_command("compare", finished_run.output, example / "gt.json", "--json").json
    number = found["registered"]
    # The truth names all photos of the example; the pairs among those given are what can be right.
    assert number * (number - 1) // 2 == found["pairs_measured"]
    share = found["pairs_measured"] / found["pairs"]
    assert 0.7 * share < found["auc"]["5"] <= share
    assert found["scenes"][0]["trajectory"]["rmse_of_size"] < 0.01


def test_run_json_tells_what_was_done(finished_run: Any, photo_folder: Path) -> None:
    report = report_of(finished_run.output)
    assert [stage["stage"] for stage in report["stages"]] == [
        "prepare", "encode", "pairs", "match", "align", "map", "export",
    ]  # fmt: skip
    assert report["num_images"] == len(list(photo_folder.iterdir()))
    assert report["error"] == ""
    assert report["config"]["seed"] == 0
    assert report["model"] == "xfeat"
    assert report["left_out"] == []
    model = report["models"][0]
    assert model["path"] == "sparse/0"
    assert model["points"] > 200
    assert 2 <= model["mean_track_length"] <= len(model["images"])
    assert 0 < model["mean_reprojection_error_px"] < 2
    assert all(stage["peak_memory_mb"] > 50 for stage in report["stages"])


def test_the_same_command_again_resumes_and_changes_nothing(
    finished_run: Any, photo_folder: Path, tmp_path: Path, run_command: Command
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished_run.output, output)
    result = run_command("reconstruct", photo_folder, "-o", output, "--threads", 2, "--json")
    assert result.code == 0, result.err
    assert result.json == report_of(output)
    resumed = {stage["stage"]: stage["resumed"] for stage in result.json["stages"]}
    assert resumed["encode"] >= 1
    assert resumed["match"] >= 1
    assert_same_result(finished_run.output, output)


def test_a_run_that_was_killed_goes_on_to_the_same_result(
    finished_run: Any,
    photo_folder: Path,
    tmp_path: Path,
    run_command: Command,
    start_command: Callable[..., subprocess.Popen[str]],
) -> None:
    output = tmp_path / "out"
    process = start_command("reconstruct", photo_folder, "-o", output, "--threads", 2)
    while process.poll() is None and not list((output / "cache" / "match").glob("*/manifest.json")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert process.returncode == -9, "the run ended before it could be killed"
    assert not (output / "run.json").exists()
    result = run_command("reconstruct", photo_folder, "-o", output, "--threads", 2)
    assert result.code == 0, result.err
    assert report_of(output)["stages"][1]["resumed"] >= 1
    assert_same_result(finished_run.output, output)


def test_a_changed_photo_is_not_taken_from_the_cache(
    finished_run: Any, photo_folder: Path, tmp_path: Path, run_here: Command
) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    shutil.copytree(photo_folder, images)
    shutil.copytree(finished_run.output, output)
    names = sorted(path.name for path in images.iterdir())
    exchanged = dict(zip(names, names, strict=True)) | {names[0]: names[3], names[3]: names[0]}
    for name, other in exchanged.items():
        shutil.copy(photo_folder / name, images / other)
    result = run_here("reconstruct", images, "-o", output, "--threads", 2)
    assert result.code == 0, result.err
    (before,) = read_poses(finished_run.output)
    moved = truth_from_poses({exchanged[name]: pose for name, pose in before.items()})
    assert compare(read_poses(output), moved).auc[3] > 0.8
    assert compare(read_poses(output), truth_from_poses(before)).auc[3] < 0.7


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--model", "sift"], "no model 'sift'"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "cuda:99"], "CUDA"),
    ],
)
def test_models_and_devices_that_are_not_there(
    arguments: list[str], part: str, two_photos: Path, tmp_path: Path, run_here: Command
) -> None:
    result = run_here("reconstruct", two_photos, "-o", tmp_path / "out", *arguments)
    assert result.code == 2
    assert result.out == ""
    assert part in result.err
