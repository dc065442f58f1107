"""`reconstruct --features` on rendered photos: what is matched, and that every way leads to a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mast3r_sfm.synthetic.photos import write_photos
from mast3r_sfm.synthetic.render import make_views

Command = Callable[..., Any]
SETTINGS = ("--model", "xfeat", "--device", "cpu", "--threads", 2, "--set", "encode.keypoints=1500")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four views of a house, and their truth."""
    folder = tmp_path_factory.mktemp("features")
    write_photos(folder, make_views("facade", 4, width_px=320, height_px=240, samples=1))
    return folder


@pytest.mark.parametrize("features", ["auto", "model", "sift", "both"])
def test_every_kind_of_features_leads_to_a_model(
    features: str, photos: Path, tmp_path: Path, run_here: Command
) -> None:
    output = tmp_path / "out"
    result = run_here("reconstruct", photos / "images", "-o", output, "--features", features, *SETTINGS)
    assert result.code == 0, result.err
    assert result.out.startswith("4 of 4 images registered in 1 model\n")
    report = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert report["config"]["match"]["features"] == features
    # These photos hang together by the model's matches: auto does not look for others.
    assert (output / "cache" / "sift").is_dir() == (features in ("sift", "both"))
    found = run_here("compare", output, photos / "gt.json", "--json").json
    assert found["registered"] == 4
    assert 0.5 < found["auc"]["5"] <= 1


def test_features_change_the_matches_only(photos: Path, tmp_path: Path, run_here: Command) -> None:
    output = tmp_path / "out"
    keys, resumed = [], []
    for features in ("model", "sift", "model"):
        arguments = ("reconstruct", photos / "images", "-o", output, "--features", features, "--json", *SETTINGS)
        stages = {stage["stage"]: stage for stage in run_here(*arguments).json["stages"]}
        keys.append({name: stage["key"] for name, stage in stages.items()})
        resumed.append(stages["match"]["resumed"])
    for name in ("prepare", "encode", "pairs"):
        assert keys[0][name] == keys[1][name]
    assert keys[0]["match"] != keys[1]["match"]
    assert keys[0] == keys[2]
    assert resumed == [0, 0, 2]  # a chunk of pairs, and the whole once settled


def test_an_option_wins_over_a_setting(photos: Path, tmp_path: Path, run_here: Command) -> None:
    arguments = ("reconstruct", photos / "images", "-o", tmp_path / "out", *SETTINGS)
    result = run_here(*arguments, "--set", "match.features=both", "--features", "model", "--json")
    assert result.code == 0, result.err
    assert result.json["config"]["match"]["features"] == "model"


@pytest.mark.parametrize("features", ["surf", "SIFT", "model,sift", ""])
def test_features_that_cannot_be(features: str, photos: Path, tmp_path: Path, run_here: Command) -> None:
    result = run_here("reconstruct", photos / "images", "-o", tmp_path / "out", "--features", features)
    assert result.code == 2
    assert result.out == ""
    assert f"match.features = '{features}': must be one of auto, model, sift, both" in result.err
    assert not (tmp_path / "out").exists()
