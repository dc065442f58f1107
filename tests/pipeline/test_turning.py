"""A pointmap model and photos from one point: no model, but the turns, and what it is is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm import pipeline
from mast3r_sfm.config import Config, RunOptions
from mast3r_sfm.errors import ReconstructionError
from mast3r_sfm.geometry.rigid import angle_between_rotations
from mast3r_sfm.synthetic.oracle import OracleModel, OracleNoise
from mast3r_sfm.synthetic.render import make_views
from tests.scenes import photo_folder


def test_a_turning_camera_gets_its_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = make_views("rotation", 6, width_px=192, height_px=144, samples=1)
    model = OracleModel(views, OracleNoise(pixel_px=1.0, depth_relative=0.01, log_scale=0.3, log_focal=0.03))
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: model)
    out = tmp_path / "out"
    with pytest.raises(ReconstructionError, match=r"pure rotation: 6 photos .* stands in rotations\.json"):
        pipeline.reconstruct(photo_folder(tmp_path, views), out, Config(), RunOptions(threads=1))
    assert "pure rotation" in json.loads((out / "run.json").read_text())["error"]
    (part,) = json.loads((out / "rotations.json").read_text())["parts"]
    assert [photo["name"] for photo in part["photos"]] == sorted(views)
    turned = np.array([photo["cam_from_world_rotation"] for photo in part["photos"]])
    exact = np.array([views[name].cam_from_world[:, :3] for name in sorted(views)])
    first, second = np.triu_indices(6, 1)
    relative = [rotations[second] @ rotations[first].transpose(0, 2, 1) for rotations in (turned, exact)]
    missed = angle_between_rotations(relative[0], relative[1])
    assert 0.005 < np.degrees(np.mean(missed)) < 0.2
    assert part["photos"][0]["focal_px"] == pytest.approx(next(iter(views.values())).K[0, 0], rel=0.01)
