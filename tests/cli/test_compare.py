"""`compare`: what it reads, what it prints, and what it says of files it cannot use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mast3r_sfm_cli.compare import find_models
from mast3r_sfm_cli.main import run

Poses = dict[str, NDArray[np.float64]]


def pose(position: tuple[float, float, float], yaw_deg: float) -> NDArray[np.float64]:
    c, s = np.cos(np.radians(yaw_deg)), np.sin(np.radians(yaw_deg))
    rotation = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    return np.column_stack([rotation, -rotation @ np.array(position)])


@pytest.fixture
def poses() -> Poses:
    rng = np.random.default_rng(3)
    return {f"sub/{index}ü.jpg": pose(tuple(rng.uniform(-2, 2, 3)), 10.0 * index) for index in range(6)}


def write_model(folder: Path, poses: Mapping[str, NDArray[np.float64]]) -> Path:
    """A COLMAP model in text form, without points."""
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text("1 PINHOLE 640 480 500 500 320 240\n")
    (folder / "points3D.txt").write_text("")
    lines = []
    for number, (name, matrix) in enumerate(poses.items(), start=1):
        # A turn by an angle about y: the quaternion is (cos, 0, ±sin, 0) of its half.
        half = np.arctan2(-matrix[0, 2], matrix[0, 0]) / 2
        values = [np.cos(half), 0.0, -np.sin(half), 0.0, *matrix[:, 3]]
        lines.append(f"{number} {' '.join(f'{value:.17g}' for value in values)} 1 {name}\n\n")
    (folder / "images.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def write_truth(path: Path, poses: Poses, **more: Any) -> Path:
    images = {name: {"R": matrix[:, :3].tolist(), "t": matrix[:, 3].tolist()} for name, matrix in poses.items()}
    path.write_text(json.dumps({"images": images, **more}), encoding="utf-8")
    return path


def compared(capsys: pytest.CaptureFixture[str], model: Path, truth: Path) -> Any:
    assert run(["compare", str(model), str(truth), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_perfect_model_against_a_json_truth(tmp_path: Path, poses: Poses, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model", poses)
    found = compared(capsys, model, write_truth(tmp_path / "gt.json", poses))
    assert (found["images"], found["registered"], found["pairs"]) == (6, 6, 15)
    assert found["auc"] == {limit: pytest.approx(1.0, abs=1e-6) for limit in ("1", "3", "5", "10")}
    assert found["rotation_accuracy"] == {"5": 1.0, "15": 1.0}
    assert found["median_rotation_deg"] < 1e-5
    assert found["scenes"][0]["trajectory"]["rmse"] < 1e-9


def test_a_table_for_people_as_a_process(tmp_path: Path, poses: Poses, run_command: Callable[..., Any]) -> None:
    wrong = dict(poses)
    wrong["sub/2ü.jpg"] = pose((0.0, 0.0, 0.0), 27.0)
    del wrong["sub/5ü.jpg"]
    result = run_command("compare", write_model(tmp_path / "m", wrong), write_truth(tmp_path / "gt.json", poses))
    assert result.code == 0
    assert result.err == ""
    for part in ("registered", "5 of 6", "10 of 15", "AUC", "@1°", "@10°", "RRA", "RTA", "median error", "ATE"):
        assert part in result.out
    assert "missing" in result.out
    assert "sub/5ü.jpg" in result.out


def test_model_against_model_needs_no_common_frame(
    tmp_path: Path, poses: Poses, capsys: pytest.CaptureFixture[str]
) -> None:
    turn = pose((1.0, 2.0, 3.0), 77.0)
    moved = {}
    for name, matrix in poses.items():
        rotation = matrix[:, :3] @ turn[:, :3]
        moved[name] = np.column_stack([rotation, 3.0 * (matrix[:, :3] @ turn[:, 3] + matrix[:, 3])])
    found = compared(capsys, write_model(tmp_path / "a", moved), write_model(tmp_path / "b", poses))
    assert found["auc"]["1"] == pytest.approx(1.0, abs=1e-5)
    assert found["scenes"][0]["trajectory"]["rmse_of_size"] < 1e-6


def test_all_models_of_an_output_are_taken_in_order(
    tmp_path: Path, poses: Poses, capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(poses)
    write_model(tmp_path / "out" / "sparse" / "0", {name: poses[name] for name in names[:4]})
    write_model(tmp_path / "out" / "sparse" / "10", {names[5]: poses[names[5]]})
    write_model(tmp_path / "out" / "sparse" / "2", {names[4]: poses[names[4]]})
    assert [folder.name for folder in find_models(tmp_path / "out")] == ["0", "2", "10"]
    found = compared(capsys, tmp_path / "out", write_truth(tmp_path / "gt.json", poses))
    assert (found["models"], found["registered"], found["registered_in_largest"]) == (3, 6, 4)
    assert found["auc"]["1"] == pytest.approx(6 / 15, abs=1e-5)


def test_several_models_as_truth_are_scenes(tmp_path: Path, poses: Poses, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(poses)
    for number, part in enumerate((names[:3], names[3:])):
        write_model(tmp_path / "truth" / str(number), {name: poses[name] for name in part})
    found = compared(capsys, write_model(tmp_path / "model", poses), tmp_path / "truth")
    assert [scene["images"] for scene in found["scenes"]] == [3, 3]
    assert found["wrong_joins"] == 3


def test_strangers_are_named(tmp_path: Path, poses: Poses, capsys: pytest.CaptureFixture[str]) -> None:
    truth = write_truth(tmp_path / "gt.json", poses, unrelated=["stranger.jpg"])
    model = write_model(tmp_path / "model", poses | {"stranger.jpg": pose((0, 0, 0), 5), "x.jpg": pose((0, 0, 1), 5)})
    assert run(["compare", str(model), str(truth)]) == 0
    out = capsys.readouterr().out
    assert "wrong model" in out
    assert "stranger.jpg" in out
    assert "not in truth" in out


def test_a_run_without_a_model_scores_nothing(tmp_path: Path, poses: Poses, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    found = compared(capsys, tmp_path, write_truth(tmp_path / "gt.json", poses))
    assert (found["registered"], found["models"], found["auc"]["10"]) == (0, 0, 0.0)


class TestErrors:
    @pytest.fixture
    def truth(self, tmp_path: Path, poses: Poses) -> Path:
        return write_truth(tmp_path / "gt.json", poses)

    def failed(self, capsys: pytest.CaptureFixture[str], *arguments: Path) -> str:
        assert run(["compare", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    def test_no_such_folder(self, tmp_path: Path, truth: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "does not exist" in self.failed(capsys, tmp_path / "missing", truth)
        assert "not a folder" in self.failed(capsys, truth, truth)

    def test_a_folder_without_a_model(self, tmp_path: Path, truth: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "images.bin" in self.failed(capsys, tmp_path, truth)

    def test_a_broken_model(self, tmp_path: Path, truth: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        for name in ("cameras", "images", "points3D"):
            (folder / f"{name}.bin").write_bytes(b"\x05")
        assert str(folder) in self.failed(capsys, folder, truth)

    def test_a_broken_truth(
        self, tmp_path: Path, poses: Poses, truth: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = write_model(tmp_path / "model", poses)
        truth.write_text("{")
        assert "JSON" in self.failed(capsys, model, truth)
        assert "gone.json" in self.failed(capsys, model, tmp_path / "gone.json")

    def test_no_common_image(self, tmp_path: Path, poses: Poses, capsys: pytest.CaptureFixture[str]) -> None:
        model = write_model(tmp_path / "model", poses)
        truth = write_truth(tmp_path / "gt.json", {f"x{name}": matrix for name, matrix in poses.items()})
        assert "names" in self.failed(capsys, model, truth)
