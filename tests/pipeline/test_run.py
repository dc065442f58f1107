"""The whole chain on the example's photos: result, report, resuming, failing."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
from PIL import Image

import mast3r_sfm
from mast3r_sfm import pipeline
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.config import Config, EncodeConfig
from mast3r_sfm.errors import ConfigError, InputError, ReconstructionError
from mast3r_sfm.evaluation.metrics import compare
from mast3r_sfm.evaluation.pairs import measure_pairs
from mast3r_sfm.evaluation.truth import read_truth_json
from mast3r_sfm.geometry.rigid import compose_poses, make_pose
from mast3r_sfm.matching import stage as match_stage
from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.report import read_report
from mast3r_sfm.summaries import ModelSummary, RunReport, StageReport
from mast3r_sfm.types import Float64, PairMatches, Rig
from tests.pipeline.conftest import PHOTOS, SMALL, Reconstruct, Run

STAGES = ("prepare", "encode", "pairs", "match", "align", "map", "export")


def house_truth(repository: Path, names: list[str]) -> dict[str, Float64]:
    truth = read_truth_json(repository / "examples" / "house" / "gt.json")
    return {name: truth.cam_from_world[name] for name in names}


def assert_same_model(one: ColmapModel, two: ColmapModel, tolerance: float) -> None:
    assert list(one.cam_from_world) == list(two.cam_from_world)
    for name, pose in one.cam_from_world.items():
        np.testing.assert_allclose(pose, two.cam_from_world[name], atol=tolerance)
    assert one.num_points == pytest.approx(two.num_points, rel=0.01)


def test_all_photos_stand_in_one_accurate_model(first_run: Run, house: Path, repository: Path) -> None:
    names = sorted(photo.name for photo in house.iterdir())
    assert len(names) == PHOTOS
    model = first_run.model
    assert list(model.cam_from_world) == names
    truth = read_truth_json(repository / "examples" / "house" / "gt.json").restricted_to(names)
    comparison = compare([model.cam_from_world], truth)
    assert comparison.registered == PHOTOS
    assert 0.9 < comparison.auc[5] < 1
    assert comparison.pairs.rotation_deg.max() < 1
    assert comparison.pairs.rotation_deg.max() > 1e-4  # photos are never exact
    focal_px = truth.intrinsics[names[0]][0, 0]
    for camera in model.cameras.values():
        assert camera.params[0] == pytest.approx(focal_px, rel=0.03)


def test_what_is_written(first_run: Run) -> None:
    assert sorted(path.name for path in first_run.output.iterdir()) == [
        "cache",
        "database.db",
        "points.ply",
        "run.json",
        "sparse",
    ]
    assert [path.name for path in (first_run.output / "sparse").iterdir()] == ["0"]
    model = pycolmap.Reconstruction(str(first_run.output / "sparse" / "0"))
    for point in model.points3D.values():
        images = [element.image_id for element in point.track.elements]
        assert len(images) == len(set(images)) >= 2
    # The points carry the photos' colours.
    assert np.array([point.color for point in model.points3D.values()]).std() > 5
    with pycolmap.Database.open(str(first_run.output / "database.db")) as database:
        assert database.num_images() == PHOTOS
        assert database.num_verified_image_pairs() >= PHOTOS - 1


def test_the_report_is_run_json(first_run: Run) -> None:
    written = first_run.json
    fields = {field.name for field in dataclasses.fields(RunReport)}
    assert set(written) == fields
    plain: dict[str, Any] = dataclasses.asdict(first_run.report)
    for name in fields - {"stages", "models", "left_out", "rejected_pairs", "notes"}:
        assert written[name] == plain[name]
    assert [set(stage) for stage in written["stages"]] == [{f.name for f in dataclasses.fields(StageReport)}] * 7
    assert [set(model) for model in written["models"]] == [{f.name for f in dataclasses.fields(ModelSummary)}]
    assert written["version"] == mast3r_sfm.__version__
    assert written["versions"]["pycolmap"] == pycolmap.__version__
    assert written["model"] == "xfeat"
    assert Config.from_mapping(written["config"]) == Config().with_overrides(SMALL)
    assert written["num_images"] == PHOTOS
    assert written["left_out"] == written["rejected_pairs"] == []
    assert written["error"] == ""
    assert read_report(first_run.output) == written


def test_the_stages_report_in_order(first_run: Run) -> None:
    stages = first_run.report.stages
    assert tuple(stage.stage for stage in stages) == STAGES
    assert all(stage.seconds >= 0 and stage.peak_memory_mb > 10 and stage.warnings == () for stage in stages)
    assert first_run.report.seconds >= sum(stage.seconds for stage in stages)
    keys = [stage.key for stage in stages if stage.stage != "export"]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)
    assert first_run.resumed == {"encode": 0, "pairs": 0, "match": 0}


def test_the_counts_fit_together(first_run: Run) -> None:
    counts = {stage.stage: stage.counts for stage in first_run.report.stages}
    assert counts["prepare"] == {"photos": PHOTOS, "usable": PHOTOS}
    assert counts["pairs"]["pairs"] == counts["match"]["pairs"] == PHOTOS * (PHOTOS - 1) / 2
    assert counts["pairs"]["exhaustive"] == sum(counts["pairs"].values()) / 2
    kinds = ("good", "planar", "pure rotation", "weak", "too few matches")
    assert sum(counts["match"][kind] for kind in kinds) == counts["match"]["pairs"]
    assert counts["match"]["links"] == sum(counts["match"][kind] for kind in kinds[:3])
    assert counts["align"] == {"parts": 1, "images": PHOTOS, "rejected pairs": 0}
    assert counts["map"] == {"models": 1, "images": PHOTOS}
    (model,) = first_run.report.models
    assert counts["export"] == {"points": model.points, "observations": model.observations}
    assert 200 < model.points < model.observations
    assert model.path == "sparse/0"
    assert model.mean_reprojection_error_px < 2
    assert first_run.report.num_registered == PHOTOS


def test_progress_is_told(first_run: Run) -> None:
    listener = first_run.listener
    assert [stage for stage, _, _ in listener.started] == ["prepare", "encode", "pairs", "match", "map"]
    assert listener.steps == sum(total for _, total, _ in listener.started)
    assert listener.finished == len(listener.started)
    assert any("xfeat" in note for note in listener.notes)
    assert list(first_run.report.notes) == listener.notes
    assert listener.warnings == []


def test_a_second_run_takes_up_the_first(
    first_run: Run, second_output: Path, run_small: Reconstruct, house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("mast3r_sfm.models.xfeat.model.XFeatModel.encode", fail)
    again = run_small(house, second_output)
    assert again.keys == first_run.keys
    assert again.resumed["encode"] == again.resumed["pairs"] == 1
    assert again.resumed["match"] >= 1
    assert_same_model(again.model, first_run.model, 1e-6)
    assert not any(stage == "pairs" for stage, _, _ in again.listener.started)
    done_again = sum(total for stage, total, _ in first_run.listener.started if stage != "pairs")
    assert again.listener.steps == done_again


def test_a_fresh_run_forgets_the_first_and_finds_the_same(
    first_run: Run, second_output: Path, run_small: Reconstruct, house: Path
) -> None:
    again = run_small(house, second_output, resume=False, threads=1)
    assert again.resumed == {"encode": 0, "pairs": 0, "match": 0}
    assert again.keys == first_run.keys  # neither threads nor resuming enter the keys
    assert_same_model(again.model, first_run.model, 1e-3)


def test_a_broken_chunk_is_done_again(first_run: Run, second_output: Path, run_small: Reconstruct, house: Path) -> None:
    (chunk,) = (second_output / "cache" / "encode").rglob("*.safetensors")
    chunk.write_bytes(chunk.read_bytes()[:1000])
    again = run_small(house, second_output)
    assert again.resumed["encode"] == 0
    assert again.resumed["match"] >= 1
    (warning,) = again.listener.warnings
    assert "is broken" in warning
    assert [stage.warnings for stage in again.report.stages if stage.stage == "encode"] == [(warning,)]
    assert_same_model(again.model, first_run.model, 1e-6)


@pytest.mark.parametrize(
    ("setting", "first_changed"),
    [
        ("encode.keypoints=1400", "encode"),
        ("encode.max_size_px=440", "encode"),
        ("pairs.neighbours=9", "pairs"),
        ("seed=5", "pairs"),
        ("match.min_inliers=21", "match"),
        ("align.max_rotation_error_deg=7", "align"),
        ("map.min_angle_deg=1.4", "map"),
    ],
)
def test_a_setting_changes_the_keys_from_its_stage_on(
    first_run: Run, second_output: Path, run_small: Reconstruct, house: Path, setting: str, first_changed: str
) -> None:
    again = run_small(house, second_output, setting)
    changed = [stage for stage in STAGES if again.keys[stage] != first_run.keys[stage]]
    assert changed == list(STAGES[STAGES.index(first_changed) :])
    for stage, resumed in again.resumed.items():
        assert (resumed > 0) == (stage not in changed)
    assert len(again.model.cam_from_world) == PHOTOS


def test_a_changed_photo_is_noticed(
    first_run: Run, second_output: Path, run_small: Reconstruct, house: Path, tmp_path: Path
) -> None:
    photos = shutil.copytree(house, tmp_path / "photos")
    changed = sorted(photos.iterdir())[0]
    with Image.open(changed) as photo:
        photo.point(lambda value: value * 0.9).save(changed, quality=95)
    again = run_small(photos, second_output)
    assert all(again.keys[stage] != first_run.keys[stage] for stage in STAGES)
    assert again.resumed == {"encode": 0, "pairs": 0, "match": 0}


def test_strangers_and_broken_files_are_left_out_with_reasons(
    run_small: Reconstruct, house: Path, tmp_path: Path
) -> None:
    photos = shutil.copytree(house, tmp_path / "photos")
    foggy(0, cells=40).save(photos / "stranger.jpg")
    foggy(1).save(photos / "fog.jpg")
    Image.new("RGB", (640, 480), (90, 90, 90)).save(photos / "lid.jpg")
    whole = sorted(house.iterdir())[0].read_bytes()
    (photos / "broken.jpg").write_bytes(whole[:300])
    run = run_small(photos, tmp_path / "out")
    assert len(run.model.cam_from_world) == PHOTOS
    reasons = {entry.name: entry.reason for entry in run.report.left_out}
    assert list(reasons) == ["broken.jpg", "fog.jpg", "lid.jpg", "stranger.jpg"]
    assert reasons["stranger.jpg"] == reasons["fog.jpg"] == "no other photo was found to show the same place"
    assert "no content" in reasons["lid.jpg"]
    assert len(reasons["broken.jpg"]) > 10
    assert run.report.num_images == PHOTOS + 4
    assert run.report.stages[0].counts == {"photos": PHOTOS + 4, "usable": PHOTOS + 2}


def test_photos_on_their_side(run_small: Reconstruct, house: Path, repository: Path, tmp_path: Path) -> None:
    """Half of the photos are stored lying, as their EXIF says: the poses are those of the stored files."""
    photos = tmp_path / "photos"
    photos.mkdir()
    names = sorted(photo.name for photo in house.iterdir())
    truth = house_truth(repository, names)
    lying = make_pose(np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), np.zeros(3))
    for number, name in enumerate(names):
        with Image.open(house / name) as photo:
            if number % 2:
                exif = photo.getexif()
                exif[0x0112] = 6  # turn by 90° clockwise to look at it
                photo.transpose(Image.Transpose.ROTATE_90).save(photos / name, quality=95, exif=exif)
                truth[name] = compose_poses(lying, truth[name])
            else:
                shutil.copy(house / name, photos / name)
    run = run_small(photos, tmp_path / "out")
    model = run.model
    assert len(model.cam_from_world) == PHOTOS
    errors = measure_pairs([model.cam_from_world], truth, names)
    assert errors.rotation_deg.max() < 1.5
    assert np.median(errors.translation_deg) < 2
    sizes = {name: (camera.width_px, camera.height_px) for name, camera in model.cameras.items()}
    assert sizes[names[1]] == sizes[names[0]][::-1]


def test_names_may_be_anything(run_small: Reconstruct, house: Path, tmp_path: Path) -> None:
    photos = tmp_path / "Zürich photos"
    names = []
    for number, photo in enumerate(sorted(house.iterdir())[:3]):
        name = f"day {number % 2}/größe № {number}.JPG"
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, photos / name)
        names.append(name)
    run = run_small(photos, tmp_path / "out put")
    assert list(run.model.cam_from_world) == sorted(names)
    assert sorted(run.json["models"][0]["images"]) == sorted(names)


def test_two_photos_are_enough(run_small: Reconstruct, house: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for photo in sorted(house.iterdir())[2:4]:
        shutil.copy(photo, photos / photo.name)
    run = run_small(photos, tmp_path / "out")
    assert len(run.model.cam_from_world) == 2
    assert run.model.num_points > 50


def foggy(seed: int, cells: int = 3) -> Image.Image:
    """A photo of smooth colours, without anything to hold on to."""
    colours = np.random.default_rng(seed).integers(0, 255, (cells, cells, 3), np.uint8)
    return Image.fromarray(colours).resize((320, 240), Image.Resampling.BICUBIC)


def foggy_photos(folder: Path) -> Path:
    folder.mkdir()
    for number in range(3):
        foggy(number).save(folder / f"{number}.png")
    return folder


def test_photos_of_nothing(run_small: Reconstruct, tmp_path: Path) -> None:
    with pytest.raises(ReconstructionError, match=r"no two photos .* take photos with more overlap"):
        run_small(foggy_photos(tmp_path / "photos"), tmp_path / "out")
    report = read_report(tmp_path / "out")
    assert "no two photos" in report["error"]
    assert report["models"] == []
    assert report["num_images"] == 3
    assert [stage["stage"] for stage in report["stages"]] == list(STAGES[:5])
    assert report["stages"][3]["counts"]["links"] == 0
    assert not (tmp_path / "out" / "points.ply").exists()


def test_a_failing_run_leaves_no_model_of_an_earlier_one(
    second_output: Path, run_small: Reconstruct, tmp_path: Path
) -> None:
    """A script that looks for sparse/0 must not take the last week's photos for today's."""
    assert (second_output / "sparse" / "0").is_dir()
    with pytest.raises(ReconstructionError):
        run_small(foggy_photos(tmp_path / "photos"), second_output)
    assert not any((second_output / "sparse").glob("*"))
    assert not (second_output / "points.ply").exists()
    assert read_report(second_output)["models"] == []


def test_photos_that_are_not_there(run_small: Reconstruct, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run_small(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_model_that_does_not_exist(run_small: Reconstruct, house: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="xfeet"):
        run_small(house, tmp_path / "out", "encode.model=xfeet")
    assert "xfeet" in read_report(tmp_path / "out")["error"]


def test_reports_that_cannot_be_read(tmp_path: Path) -> None:
    assert read_report(tmp_path) == {}
    for text in ("", "{", "[1]", "\x00"):
        (tmp_path / "run.json").write_text(text)
        assert read_report(tmp_path) == {}
    (tmp_path / "run.json").write_bytes(b"\xff\xfe")
    assert read_report(tmp_path) == {}
    (tmp_path / "run.json").write_text('{"version": "1"}')
    assert read_report(tmp_path) == {"version": "1"}


def test_the_model_is_asked_for_the_keypoints_that_suit_the_collection(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(*_: object, config: EncodeConfig, **__: object) -> None:
        asked.append(config.keypoints)
        raise ConfigError("enough")

    monkeypatch.setattr(pipeline, "load_model", load)
    for number, settings in enumerate(([], ["encode.keypoints=900"])):
        with pytest.raises(ConfigError, match="enough"):
            pipeline.reconstruct(house, tmp_path / str(number), Config().with_overrides(settings))
    assert asked == [6826, 900]


def test_pairs_are_calibrated_anew_with_the_focal_length_that_alignment_finds(
    run_small: Reconstruct, house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess half as long again costs next to nothing in the end."""
    guess, calibrate = match_stage.estimate_focal_ratios, match_stage.Matcher.calibrate
    focal_px: list[float] = []

    def noting(self: match_stage.Matcher, edges: Sequence[EpipolarEdge], rig: Rig) -> list[PairMatches]:
        focal_px.append(float(rig.cameras[0].params[0]))
        return calibrate(self, edges, rig)

    monkeypatch.setattr(match_stage.Matcher, "calibrate", noting)
    good = run_small(house, tmp_path / "good")
    near = len(focal_px)
    monkeypatch.setattr(match_stage, "estimate_focal_ratios", lambda *given, **more: 1.5 * guess(*given, **more))
    bad = run_small(house, tmp_path / "bad", resume=False)
    (true_px,) = {camera.params[0] for camera in good.model.cameras.values()}
    found = np.abs(np.log(np.array(focal_px[near:]) / true_px))
    assert 2 <= len(found) <= 1 + pipeline.MAX_RECALIBRATIONS
    assert found[0] > 0.3
    assert found[-1] < 0.15 * found[0]
    assert sorted(bad.report.models[0].images) == sorted(good.report.models[0].images)
    assert bad.report.models[0].observations > 0.97 * good.report.models[0].observations
