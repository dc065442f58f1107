"""Where `reconstruct` agrees to write, and how its options reach the library; no photo is looked at here."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mast3r_sfm.config import Config, RunOptions
from mast3r_sfm.summaries import ImageSummary, ModelSummary, RunReport, StageReport
from mast3r_sfm.types import LeftOut
from mast3r_sfm_cli.main import run

MODEL = ModelSummary(
    path="sparse/0",
    images=("a.jpg", "b.jpg"),
    points=1234,
    observations=5000,
    mean_track_length=4.05,
    mean_reprojection_error_px=0.61,
)
REPORT = RunReport(
    version="0.1.0",
    versions={},
    model="xfeat",
    model_fingerprint="0",
    config={},
    stages=(StageReport(stage="encode", key="k", seconds=1.25, counts={}, peak_memory_mb=321.0),),
    models=(MODEL,),
    num_images=3,
    left_out=(LeftOut(name="c.jpg", reason="too small"),),
    rejected_pairs=(),
    notes=("model: xfeat",),
    seconds=2.5,
)


class FakePipeline:
    """Stands in for the chain: remembers what it was called with, and leaves a file."""

    def __init__(self) -> None:
        self.calls: list[tuple[Path, Path, Config, RunOptions]] = []
        self.report = REPORT

    def reconstruct(self, images: Path, output: Path, config: Config, options: RunOptions, _: Any) -> RunReport:
        self.calls.append((images, output, config, options))
        (output / "run.json").write_text(json.dumps(dataclasses.asdict(self.report)))
        return self.report


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "mast3r_sfm.pipeline", types.SimpleNamespace(reconstruct=fake.reconstruct))
    return fake


@pytest.fixture
def refused(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Asserts that a call ends with code 2 before the pipeline is called, and returns the message."""

    def call(*arguments: object) -> str:
        assert run(["reconstruct", *map(str, arguments)]) == 2
        assert pipeline.calls == []
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return call


class TestRefusals:
    def test_a_file(self, two_photos: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
        (tmp_path / "out").write_text("precious")
        assert "is a file" in refused(two_photos, "-o", tmp_path / "out")
        assert (tmp_path / "out").read_text() == "precious"

    def test_below_a_file(self, two_photos: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
        (tmp_path / "file").write_text("")
        message = refused(two_photos, "-o", tmp_path / "file" / "out")
        assert "cannot write to" in message
        assert "choose another folder" in message

    def test_where_nobody_can_write(self, two_photos: Path, refused: Callable[..., str]) -> None:
        if not Path("/proc/self").exists():
            pytest.skip("no /proc, the one folder in which the superuser cannot write either")
        assert "cannot write to /proc/out" in refused(two_photos, "-o", "/proc/out")
        assert "cannot write to /proc" in refused(two_photos, "-o", "/proc/self/fd", "--overwrite")

    @pytest.mark.parametrize("name", ["two", "two/out", "two/a/b", "two/../two/out"])
    def test_inside_the_photos(self, name: str, two_photos: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
        assert "inside the photos' folder" in refused(two_photos, "-o", tmp_path / name)
        assert len(list(two_photos.iterdir())) == 2

    @pytest.mark.parametrize("name", ["thesis.txt", "sparse/0/images.bin", "cache/browser/x", "run.json", ".hidden"])
    def test_files_of_somebody_else(
        self, name: str, two_photos: Path, tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        file = tmp_path / "out" / name
        file.parent.mkdir(parents=True)
        file.write_text("[1, 2]")
        message = refused(two_photos, "-o", tmp_path / "out")
        assert "choose another folder" in message
        assert "--overwrite" in message
        assert file.read_text() == "[1, 2]"


class TestAccepted:
    def test_a_new_folder_below_new_folders(self, two_photos: Path, tmp_path: Path, pipeline: FakePipeline) -> None:
        output = tmp_path / "a" / "b c"
        assert run(["reconstruct", str(two_photos), "-o", str(output)]) == 0
        assert pipeline.calls[0][:2] == (two_photos, output)
        assert {path.name for path in output.iterdir()} == {"run.json"}

    def test_an_empty_folder(self, two_photos: Path, tmp_path: Path, pipeline: FakePipeline) -> None:
        (tmp_path / "out").mkdir()
        assert run(["reconstruct", str(two_photos), "-o", str(tmp_path / "out")]) == 0
        assert len(pipeline.calls) == 1

    def test_the_output_of_an_earlier_run(self, two_photos: Path, tmp_path: Path, pipeline: FakePipeline) -> None:
        for _ in range(2):
            assert run(["reconstruct", str(two_photos), "-o", str(tmp_path / "out")]) == 0
        assert len(pipeline.calls) == 2

    @pytest.mark.parametrize("stages", [[], ["encode"], ["encode", "match"]])
    def test_the_output_of_a_run_that_was_killed(
        self, stages: list[str], two_photos: Path, tmp_path: Path, pipeline: FakePipeline
    ) -> None:
        for folder in ["", *stages]:
            (tmp_path / "out" / "cache" / folder).mkdir(parents=True, exist_ok=True)
        assert run(["reconstruct", str(two_photos), "-o", str(tmp_path / "out")]) == 0
        assert len(pipeline.calls) == 1

    def test_a_folder_around_the_photos_with_overwrite(
        self, two_photos: Path, tmp_path: Path, pipeline: FakePipeline
    ) -> None:
        assert run(["reconstruct", str(two_photos), "-o", str(tmp_path), "--overwrite"]) == 0
        assert len(pipeline.calls) == 1
        assert len(list(two_photos.iterdir())) == 2


class TestOptions:
    def call(self, pipeline: FakePipeline, tmp_path: Path, *arguments: str) -> tuple[Config, RunOptions]:
        assert run(["reconstruct", str(tmp_path / "two"), "-o", str(tmp_path / "out"), *arguments]) == 0
        return pipeline.calls[-1][2:]

    def test_defaults(self, two_photos: Path, tmp_path: Path, pipeline: FakePipeline) -> None:
        assert two_photos.is_dir()
        assert self.call(pipeline, tmp_path) == (Config(), RunOptions())

    def test_each_option_reaches_its_setting(self, tmp_path: Path, pipeline: FakePipeline) -> None:
        file = tmp_path / "config.toml"
        file.write_text("seed = 3\n[encode]\nkeypoints = 999\n[pairs]\nneighbours = 3\n")
        config, options = self.call(
            pipeline, tmp_path, "--config", str(file), "--set", "pairs.neighbours=4", "--model", "xfeat", "--seed", "7",
            "--camera-model", "OPENCV", "--single-camera", "--device", "cpu", "--threads", "2", "--no-resume",
        )  # fmt: skip
        assert (config.seed, config.encode.model, config.encode.keypoints) == (7, "xfeat", 999)
        assert (config.pairs.neighbours, config.map.camera_model, config.prepare.cameras) == (4, "OPENCV", "single")
        assert options == RunOptions(device="cpu", threads=2, resume=False)

    def test_the_words_of_colmap(self, two_photos: Path, tmp_path: Path, pipeline: FakePipeline) -> None:
        arguments = ["reconstruct", "--image-path", str(two_photos), "--output-path", str(tmp_path / "out")]
        assert run(arguments) == 0
        assert pipeline.calls[0][:2] == (two_photos, tmp_path / "out")

    @pytest.mark.parametrize(
        "arguments",
        [["--camera-model", "FANCY"], ["--seed", "-1"], ["--threads", "-1"], ["--set", "encode.keypoints=1"]],
    )
    def test_impossible_values(self, arguments: list[str], tmp_path: Path, refused: Callable[..., str]) -> None:
        assert arguments[1].partition("=")[2] or arguments[1] in refused("photos", "-o", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists()


class TestEnd:
    def call(self, tmp_path: Path, *arguments: str) -> int:
        return run(["reconstruct", str(tmp_path / "two"), "-o", str(tmp_path / "out"), *arguments])

    @pytest.mark.usefixtures("pipeline")
    def test_the_summary_says_what_came_out(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.call(tmp_path) == 0
        out, err = capsys.readouterr()
        for part in (
            "2 of 3 images registered in 1 model\n",
            "sparse/0: 2 images, 1,234 points, mean track length 4.05, mean reprojection error 0.61 px",
            "c.jpg: too small",
            "note: model: xfeat",
            "2.5 s (encode 1.2), 321 MB",
            f"{tmp_path / 'out' / 'sparse' / '0'}: COLMAP model",
            f"{tmp_path / 'out' / 'run.json'}: ",
        ):
            assert part in out
        assert err == "warning: 1 of 3 photos are not in the result: c.jpg\n"

    @pytest.mark.usefixtures("pipeline")
    def test_json_is_one_object_equal_to_run_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.call(tmp_path, "--json") == 0
        out, err = capsys.readouterr()
        assert json.loads(out) == json.loads((tmp_path / "out" / "run.json").read_text())
        assert out.count("\n") == 1
        assert "c.jpg" in err

    @pytest.mark.usefixtures("pipeline")
    def test_quiet_leaves_warnings_only(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.call(tmp_path, "--quiet") == 0
        assert capsys.readouterr() == ("", "warning: 1 of 3 photos are not in the result: c.jpg\n")

    def test_nothing_left_out_needs_no_warning(
        self, tmp_path: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pipeline.report = dataclasses.replace(REPORT, num_images=2, left_out=())
        assert self.call(tmp_path) == 0
        out, err = capsys.readouterr()
        assert "left out" not in out
        assert err == ""

    def test_many_left_out_photos_are_counted(
        self, tmp_path: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
    ) -> None:
        left_out = tuple(LeftOut(name=f"bad{index:02d}.jpg", reason="broken") for index in range(50))
        pipeline.report = dataclasses.replace(REPORT, num_images=52, left_out=left_out)
        assert self.call(tmp_path) == 0
        out, err = capsys.readouterr()
        assert "left out (50)" in out
        assert "bad19.jpg" in out
        assert "bad20.jpg" not in out + err
        assert "and 30 more" in out
        assert "and 30 more" in err


def test_images_that_are_held_weakly_are_named(
    pipeline: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def image(name: str, weak: str) -> ImageSummary:
        return ImageSummary(
            name=name,
            edges=1,
            residual_deg=0.5,
            observations=31,
            mean_error_px=0.7,
            rotation_sigma_deg=None,
            position_sigma=None,
            weak=weak,
        )

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    arguments = ["reconstruct", str(tmp_path / "photos"), "-o", str(tmp_path / "out")]
    held = (image("a.jpg", ""), image("b.jpg", "one pair, 31 points"))
    pipeline.report = dataclasses.replace(REPORT, models=(dataclasses.replace(MODEL, per_image=held),))
    assert run(arguments) == 0
    assert "held weakly, their poses may be wrong (1): b.jpg (one pair, 31 points)\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["models"][0]["per_image"][1]["weak"]
    pipeline.report = REPORT
    assert run([*arguments, "--overwrite"]) == 0
    assert "held weakly" not in capsys.readouterr().out
