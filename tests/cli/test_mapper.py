"""`reconstruct --mapper`: which mapper makes the model, and that the report says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mast3r_sfm.colmap.model import read_model
from mast3r_sfm.synthetic.photos import write_photos
from mast3r_sfm.synthetic.render import make_views

Command = Callable[..., Any]
SETTINGS = ("--model", "xfeat", "--device", "cpu", "--threads", 2, "--set", "encode.keypoints=1500")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five views of a house, and their truth."""
    folder = tmp_path_factory.mktemp("mappers")
    write_photos(folder, make_views("facade", 5, width_px=320, height_px=240, samples=1))
    return folder


@pytest.mark.parametrize("mapper", ["align", "global", "incremental"])
def test_every_mapper_leads_to_a_model(mapper: str, photos: Path, tmp_path: Path, run_here: Command) -> None:
    output = tmp_path / "out"
    result = run_here("reconstruct", photos / "images", "-o", output, "--mapper", mapper, *SETTINGS)
    assert result.code == 0, result.err
    assert result.out.startswith("5 of 5 images registered in 1 model\n")
    assert (f"by COLMAP's {mapper} mapper" in result.out) == (mapper != "align")
    assert "by COLMAP's align" not in result.out
    report = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert report["config"]["map"]["mapper"] == mapper
    assert [model["mapper"] for model in report["models"]] == [mapper]
    # Refined like ours: raw keypoints are off by half a pixel and more.
    assert 0.02 < report["models"][0]["mean_reprojection_error_px"] < 0.35
    held = report["models"][0]["per_image"]
    assert [image["name"] for image in held] == report["models"][0]["images"]
    for image in held:
        assert 1 <= image["edges"] <= 4
        assert image["observations"] > 50
        assert 0.001 < image["rotation_sigma_deg"] < 0.2
        assert 1e-5 < image["position_sigma"] < 0.01
    found = run_here("compare", output, photos / "gt.json", "--json").json
    assert found["registered"] == 5
    assert 0.8 < found["auc"]["5"] <= 1


def test_a_mapper_changes_the_model_only(photos: Path, tmp_path: Path, run_here: Command) -> None:
    keys, resumed, poses = [], [], []
    for mapper in ("align", "global", "align", "global"):
        arguments = ("reconstruct", photos / "images", "-o", tmp_path / "out", "--mapper", mapper, "--json")
        stages = {stage["stage"]: stage for stage in run_here(*arguments, *SETTINGS).json["stages"]}
        keys.append({name: stage["key"] for name, stage in stages.items()})
        resumed.append(stages["match"]["resumed"])
        poses.append(read_model(tmp_path / "out" / "sparse" / "0").poses())
    for name in ("prepare", "encode", "pairs", "match", "align"):
        assert keys[0][name] == keys[1][name]
    assert keys[0]["map"] != keys[1]["map"]
    assert keys[:2] == keys[2:]
    assert resumed == [0, 2, 2, 2]
    for image, pose in poses[0].items():
        np.testing.assert_array_equal(pose, poses[2][image])
        np.testing.assert_array_equal(poses[1][image], poses[3][image])
        assert np.abs(pose - poses[1][image]).max() > 0


@pytest.mark.parametrize("mapper", ["glomap", "Global", ""])
def test_mappers_that_cannot_be(mapper: str, photos: Path, tmp_path: Path, run_here: Command) -> None:
    result = run_here("reconstruct", photos / "images", "-o", tmp_path / "out", "--mapper", mapper)
    assert result.code == 2
    assert f"map.mapper = '{mapper}': must be one of align, global, incremental" in result.err
    assert not (tmp_path / "out").exists()
