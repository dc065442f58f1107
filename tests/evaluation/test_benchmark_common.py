from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from mast3r_sfm.evaluation.metrics import area_under_recall


@pytest.fixture(scope="module")
def common(repository: Path) -> ModuleType:
    """benchmarks/common.py, which is a script's neighbour and no package."""
    spec = importlib.util.spec_from_file_location("benchmarks_common", repository / "benchmarks" / "common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photo_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one set of four photos, the last a stranger."""
    images = tmp_path / "house" / "images"
    images.mkdir(parents=True)
    names = ["a.jpg", "b.jpg", "c.JPG", "d.jpg"]
    for name in names:
        Image.new("RGB", (40, 30)).save(images / name)
    entry = {"R": np.eye(3).tolist(), "t": [0, 0, 0]}
    truth = {"images": dict.fromkeys(names[:3], entry), "unrelated": ["d.jpg"]}
    (tmp_path / "house" / "gt.json").write_text(json.dumps(truth))
    figures = {"inc": {"reg": 2, "auc5": 0.5}, "glob": {"reg": 3, "auc5": 0.75}}
    (tmp_path / "colmap_baseline.json").write_text(json.dumps({"sets": {"house": figures}}))
    monkeypatch.setenv("MAST3R_SFM_DATA", str(tmp_path))
    return tmp_path


def test_a_whole_set_is_used_in_place(common: ModuleType, photo_root: Path) -> None:
    assert common.all_sets() == ["house"]
    with common.open_set("house") as found:
        assert found.images == photo_root / "house" / "images"
        assert found.photos == ("a.jpg", "b.jpg", "c.JPG", "d.jpg")
        assert found.truth.unrelated == ("d.jpg",)


def test_a_part_of_a_set_is_copied(common: ModuleType, photo_root: Path) -> None:
    with common.open_set("house@0,2") as found:
        assert sorted(path.name for path in found.images.iterdir()) == ["a.jpg", "c.JPG"]
        assert set(found.truth.scene) == {"a.jpg", "c.JPG"}
        assert found.truth.unrelated == ()
        copied = found.images
    assert not copied.exists()
    assert (photo_root / "house" / "images" / "a.jpg").is_file()


def test_unknown_set(common: ModuleType, photo_root: Path) -> None:
    with (
        pytest.raises(SystemExit, match=f"no photo set barn in {photo_root}; there are house"),
        common.open_set("barn"),
    ):
        pass


@pytest.mark.usefixtures("photo_root")
def test_baseline_is_the_better_of_both(common: ModuleType) -> None:
    assert common.baseline("house") == {"registered": 3, "auc5": 0.75}
    assert common.baseline("opensfm_lund") == {"registered": 11}
    assert common.baseline("barn") == {}


@pytest.mark.usefixtures("photo_root")
def test_score_without_a_model_and_of_a_stranger(common: ModuleType) -> None:
    with common.open_set("house") as found:
        nothing = common.score([], found)
        poses = {name: np.eye(3, 4) for name in found.photos}
        model = common.Model(poses=poses, points=7, track_length=2.5, reprojection_px=0.5)
        everything = common.score([model], found)
    assert (nothing["registered"], nothing["auc5"], nothing["sampled_auc5"]) == (0, 0.0, 0.0)
    assert (everything["registered"], everything["auc5"], everything["sampled_auc5"]) == (4, 1.0, 1.0)
    assert everything["intruders"] == ["d.jpg"]
    assert everything["rta5"] is None


def test_sampled_auc(common: ModuleType) -> None:
    assert common.sampled_auc(np.array([0.0, 180.0]), 5.0) == 0.5
    # Reached from the second of 200 thresholds on.
    assert common.sampled_auc(np.array([0.05]), 5.0) == pytest.approx(199 / 200)
    errors = np.random.default_rng(0).uniform(0, 10, size=2000)
    assert common.sampled_auc(errors, 5.0) == pytest.approx(area_under_recall(errors, 5.0), abs=0.004)


def test_run_child(common: ModuleType) -> None:
    code = "import sys; block = b'x' * 300_000_000; print('said'); print('why', file=sys.stderr); sys.exit(3)"
    run = common.run_child([sys.executable, "-c", code])
    assert (run.code, run.stdout, run.stderr) == (3, "said\n", "why\n")
    assert run.seconds > 0
    assert run.peak_mb > 280
    assert common.failure(run) == "exit code 3: why"


def test_a_run_without_a_model_is_no_failure_but_a_crash_is(common: ModuleType) -> None:
    report = json.dumps({"stages": [{"stage": "match", "seconds": 1.234}]})
    finished = common.ChildRun(seconds=1.0, peak_mb=1.0, code=1, stdout=report, stderr="no model")
    assert common.failure(finished) == ""
    assert common.stage_seconds(finished) == {"match": 1.23}
    crashed = common.run_child([sys.executable, "-c", "raise ValueError('broken')"])
    assert common.failure(crashed) == "exit code 1: ValueError: broken"
    assert common.stage_seconds(crashed) == {}


def test_arguments_of_the_tool_stand_apart(common: ModuleType) -> None:
    assert common.split_arguments(["a", "--", "--set", "x.y=1"]) == (["a"], ["--set", "x.y=1"])
    assert common.split_arguments(["a", "--threads", "1"]) == (["a", "--threads", "1"], [])
