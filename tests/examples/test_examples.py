"""Every script of examples/ runs as its docstring says, and the example's photos are what they claim to be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mast3r_sfm.colmap.model import read_model
from mast3r_sfm.evaluation.metrics import compare
from mast3r_sfm.evaluation.truth import read_truth_json
from mast3r_sfm.synthetic.cameras import make_cameras
from mast3r_sfm.synthetic.render import render
from mast3r_sfm.synthetic.scenes import make_scene

PHOTOS = 12
SEED = 4


@pytest.fixture(scope="module")
def examples(repository: Path) -> Path:
    return repository / "examples"


def run(script: Path, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def reconstruction(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder of reconstruct_folder.py on the example's photos, and what it printed."""
    folder = tmp_path_factory.mktemp("example") / "out"
    return folder, run(examples / "reconstruct_folder.py", examples / "house" / "images", folder)


def test_every_script_has_a_test(examples: Path) -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    scripts = sorted(path.name for path in examples.glob("*.py"))
    assert len(scripts) >= 4
    assert [name for name in scripts if f'"{name}"' not in tested] == []


def test_reconstruct_folder_registers_all_photos_and_names_them(reconstruction: tuple[Path, str]) -> None:
    folder, printed = reconstruction
    assert f"{PHOTOS} of {PHOTOS} images registered" in printed
    assert "left out" not in printed
    assert all(f"  {index:04d}.jpg" in printed for index in range(PHOTOS))
    assert (folder / "run.json").is_file()


def test_the_default_model_reconstructs_the_example_well(reconstruction: tuple[Path, str], examples: Path) -> None:
    folder, _ = reconstruction
    poses = read_model(folder / "sparse" / "0").cam_from_world
    comparison = compare([poses], read_truth_json(examples / "house" / "gt.json"))
    assert comparison.auc[5] > 0.95
    assert comparison.median_rotation_deg < 0.3


def test_read_model_prints_cameras_and_poses(reconstruction: tuple[Path, str], examples: Path) -> None:
    folder, _ = reconstruction
    lines = run(examples / "read_model.py", folder / "sparse" / "0").splitlines()
    assert lines[0].startswith(f"{PHOTOS} images, ")
    (camera,) = (line for line in lines if line.startswith("camera "))
    assert "800 x 600 px" in camera
    assert 640 < float(camera.split(" f ")[1].split(",")[0]) < 690
    poses = [line for line in lines if ".jpg: camera" in line]
    assert len(poses) == PHOTOS
    assert all("looks along [" in line for line in poses)


@pytest.mark.parametrize("inner", [".", "sparse/0"])
def test_render_picture_draws_points_and_cameras(
    inner: str, reconstruction: tuple[Path, str], examples: Path, tmp_path: Path
) -> None:
    folder, _ = reconstruction
    target = tmp_path / "picture.png"
    run(examples / "render_picture.py", folder / inner, target, "--size", 320, 200)
    with Image.open(target) as file:
        assert file.size == (320, 200)
        picture = np.asarray(file.convert("RGB")).astype(int)
    drawn = np.abs(picture - picture[0, 0]).max(axis=-1) > 20
    assert 0.1 < drawn.mean() < 0.9
    # The frames of the cameras are the only strong orange.
    orange = (picture[..., 0] > 150) & (picture[..., 0] - picture[..., 2] > 90)
    assert 50 < orange.sum() < 0.1 * orange.size
    # The scene is in the middle and fills the picture.
    rows, columns = np.nonzero(drawn)
    assert columns.min() < 40
    assert columns.max() > 280
    assert rows.min() < 60
    assert rows.max() > 140


def test_make_scene_writes_photos_with_their_truth(examples: Path, tmp_path: Path) -> None:
    printed = run(
        examples / "make_scene.py", tmp_path, "--kind", "object", "--photos", 2, "--size", 64, 48, "--seed", 1
    )
    assert "2 photos" in printed
    truth = read_truth_json(tmp_path / "gt.json")
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["0000.jpg", "0001.jpg"]
    assert sorted(truth.cam_from_world) == ["0000.jpg", "0001.jpg"]


def test_the_example_is_small_and_still_what_make_scene_makes(examples: Path) -> None:
    house = examples / "house"
    assert 500_000 < sum(path.stat().st_size for path in house.rglob("*") if path.is_file()) < 5_000_000
    truth = read_truth_json(house / "gt.json")
    cameras = make_cameras("facade", PHOTOS, width_px=800, height_px=600, seed=SEED)
    small = make_cameras("facade", PHOTOS, width_px=160, height_px=120, seed=SEED)
    for index, camera in enumerate(cameras):
        np.testing.assert_allclose(truth.cam_from_world[f"{index:04d}.jpg"], camera.cam_from_world, atol=1e-12)
        np.testing.assert_allclose(truth.intrinsics[f"{index:04d}.jpg"], camera.intrinsics, atol=1e-9)
    with Image.open(house / "images" / "0005.jpg") as photo:
        shrunk = np.asarray(photo.resize((160, 120), Image.Resampling.BOX)).astype(float)
    again = render(make_scene("facade", SEED), small[5]).image
    assert np.abs(shrunk - again).mean() < 8
    assert np.corrcoef(shrunk.ravel(), again.ravel())[0, 1] > 0.95
