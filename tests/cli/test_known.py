"""Known cameras and poses on the command line: reconstruct, triangulate and register, on rendered photos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest

from mast3r_sfm.synthetic.photos import write_photos
from mast3r_sfm.synthetic.render import make_views

Command = Callable[..., Any]
SETTINGS = ("--model", "xfeat", "--device", "cpu", "--threads", 2, "--set", "encode.keypoints=1500")
NAMES = [f"{number:04d}.jpg" for number in range(5)]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five views of a house, and their truth."""
    folder = tmp_path_factory.mktemp("known")
    write_photos(folder, make_views("facade", 5, width_px=320, height_px=240, samples=1))
    return folder


def truth(scene: Path, path: Path, names: list[str] | None = None, change: Callable[[Any], None] | None = None) -> Path:
    """A gt.json of some of the photos, changed."""
    data = json.loads((scene / "gt.json").read_text(encoding="utf-8"))
    data["images"] = {name: entry for name, entry in data["images"].items() if names is None or name in names}
    for entry in data["images"].values():
        if change is not None:
            change(entry)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def read(output: Path) -> pycolmap.Reconstruction:
    return pycolmap.Reconstruction(str(output / "sparse" / "0"))


def poses(model: pycolmap.Reconstruction) -> dict[str, list[float]]:
    return {image.name: image.cam_from_world().params.tolist() for image in model.images.values()}


def true_poses(scene: Path) -> dict[str, list[float]]:
    data = json.loads((scene / "gt.json").read_text(encoding="utf-8"))["images"]
    rigid = {
        name: pycolmap.Rigid3d(pycolmap.Rotation3d(np.array(entry["R"])), np.array(entry["t"]))
        for name, entry in data.items()
    }
    return {name: pose.params.tolist() for name, pose in rigid.items()}


def true_params(scene: Path) -> list[float]:
    matrix = json.loads((scene / "gt.json").read_text(encoding="utf-8"))["images"][NAMES[0]]["K"]
    return [matrix[0][0], matrix[1][1], matrix[0][2] + 0.5, matrix[1][2] + 0.5]


def test_known_cameras_are_in_the_result_as_given(scene: Path, tmp_path: Path, run_here: Command) -> None:
    output = tmp_path / "out"
    arguments = ("reconstruct", scene / "images", "-o", output, "--json", *SETTINGS)
    result = run_here(*arguments, "--intrinsics", scene / "gt.json")
    assert result.code == 0, result.err
    (camera,) = read(output).cameras.values()
    assert camera.model.name == "PINHOLE"
    assert list(camera.params) == true_params(scene)
    found = run_here("compare", output, scene / "gt.json", "--json").json
    assert found["registered"] == 5
    assert found["auc"]["1"] > 0.5

    # Another content of the same file is another result; the same content elsewhere is not.
    first = {stage["stage"]: stage for stage in result.json["stages"]}
    copied = shutil.copy(scene / "gt.json", tmp_path / "elsewhere.json")
    again = {stage["stage"]: stage for stage in run_here(*arguments, "--intrinsics", copied).json["stages"]}
    assert {name: stage["key"] for name, stage in again.items()} == {name: s["key"] for name, s in first.items()}
    assert again["match"]["resumed"] > 0
    longer = truth(scene, Path(copied), change=lambda entry: entry["K"][0].__setitem__(0, 1.02 * entry["K"][0][0]))
    other = {stage["stage"]: stage for stage in run_here(*arguments, "--intrinsics", longer).json["stages"]}
    assert other["encode"]["resumed"] > 0
    assert other["match"]["resumed"] == 0
    (camera,) = read(output).cameras.values()
    assert camera.params[0] == 1.02 * true_params(scene)[0]


def test_known_poses_are_in_the_result_as_given(scene: Path, tmp_path: Path, run_here: Command) -> None:
    some = truth(scene, tmp_path / "some.json", [NAMES[0], NAMES[2], NAMES[3]])
    output = tmp_path / "out"
    result = run_here("reconstruct", scene / "images", "-o", output, "--poses", some, "--json", *SETTINGS)
    assert result.code == 0, result.err
    found, wanted = poses(read(output)), true_poses(scene)
    assert sorted(found) == NAMES
    for name in (NAMES[0], NAMES[2], NAMES[3]):
        # Its rotation is made orthogonal first.
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-12)
    for name in (NAMES[1], NAMES[4]):
        # In the frame and scale of the file.
        assert np.abs(np.subtract(found[name], wanted[name])).max() > 1e-6
        np.testing.assert_allclose(found[name], wanted[name], atol=0.05)
    assert any("3 of 3 photos with a known pose" in note and NAMES[1] in note for note in result.json["notes"])
    prior = run_here(
        "reconstruct", scene / "images", "-o", output, "--poses", some, "--poses-prior", "--quiet", *SETTINGS
    )
    assert prior.code == 0, prior.err
    for name, pose in poses(read(output)).items():
        assert np.abs(np.subtract(pose, wanted[name])).max() > 1e-6
        np.testing.assert_allclose(pose, wanted[name], atol=0.05)


def test_poses_that_the_photos_contradict_are_refused(scene: Path, tmp_path: Path, run_here: Command) -> None:
    def inverse(entry: dict[str, Any]) -> None:
        rotation = np.array(entry["R"]).T
        entry["t"] = (-rotation @ entry["t"]).tolist()
        entry["R"] = rotation.tolist()

    wrong = truth(scene, tmp_path / "wrong.json", change=inverse)
    result = run_here("reconstruct", scene / "images", "-o", tmp_path / "out", "--poses", wrong, *SETTINGS)
    assert result.code == 2
    assert "contradict these poses" in result.err
    assert "from world to camera" in result.err


@pytest.mark.parametrize(
    ("option", "make", "says"),
    [
        ("--intrinsics", lambda entry: entry.update(width=640), "scaled only to photos of the same shape"),
        ("--intrinsics", lambda entry: entry.pop("K"), "tells no camera"),
        ("--poses", lambda entry: (entry.pop("R"), entry.pop("t")), "tells no pose"),
    ],
)
def test_files_that_do_not_fit_end_the_run(
    option: str, make: Callable[[Any], None], says: str, scene: Path, tmp_path: Path, run_here: Command
) -> None:
    path = truth(scene, tmp_path / "gt.json", change=make)
    result = run_here("reconstruct", scene / "images", "-o", tmp_path / "out", option, path, *SETTINGS)
    assert result.code == 2
    assert says in result.err


def test_a_mode_needs_its_file(scene: Path, tmp_path: Path, run_here: Command) -> None:
    for option in ("--intrinsics-prior", "--poses-prior"):
        result = run_here("reconstruct", scene / "images", "-o", tmp_path / "out", option)
        assert result.code == 2
        assert "a file" in result.err


@pytest.mark.parametrize(("cameras", "count"), [("single", 1), ("image", 5)])
def test_who_shares_a_camera_is_an_option(
    cameras: str, count: int, scene: Path, tmp_path: Path, run_here: Command
) -> None:
    output = tmp_path / "out"
    arguments = ("reconstruct", scene / "images", "-o", output, "--cameras", cameras, "--quiet", *SETTINGS)
    assert run_here(*arguments).code == 0
    assert len(read(output).cameras) == count
    assert run_here(*arguments, "--cameras", "some").code == 2


def test_triangulate(scene: Path, tmp_path: Path, run_here: Command) -> None:
    model = truth(scene, tmp_path / "model.json", NAMES[:4])
    result = run_here("triangulate", scene / "images", model, "-o", tmp_path / "out", "--json", *SETTINGS)
    assert result.code == 0, result.err
    found = read(tmp_path / "out")
    wanted = true_poses(scene)
    # The fifth photo has no part in it.
    assert sorted(poses(found)) == NAMES[:4]
    for name, pose in poses(found).items():
        np.testing.assert_allclose(pose, wanted[name], rtol=0, atol=1e-12)
    assert [list(camera.params) for camera in found.cameras.values()] == [true_params(scene)]
    assert found.num_points3D() > 100
    assert found.compute_mean_reprojection_error() < 1
    assert [left["name"] for left in result.json["left_out"]] == [NAMES[4]]
    assert "has no pose in" in result.json["left_out"][0]["reason"]


def test_register(scene: Path, tmp_path: Path, run_here: Command, texture: Callable[..., Any]) -> None:
    """Three photos become a model, to which the others are added, except for one that shows something else."""
    every = shutil.copytree(scene / "images", tmp_path / "every")
    texture(320, 240).save(every / "stranger.png")
    photos = tmp_path / "three"
    photos.mkdir()
    for name in NAMES[:3]:
        shutil.copy(scene / "images" / name, photos / name)
    assert run_here("reconstruct", photos, "-o", tmp_path / "first", "--quiet", *SETTINGS).code == 0
    model = tmp_path / "first" / "sparse" / "0"
    before = read(tmp_path / "first")
    result = run_here("register", every, model, "-o", tmp_path / "out", *SETTINGS)
    assert result.code == 0, result.err
    assert "stranger.png: no other photo was found to show the same place" in result.out
    assert f"2 more placed in their frame: {NAMES[3]}, {NAMES[4]}" in result.out
    after = read(tmp_path / "out")
    assert sorted(poses(after)) == NAMES
    assert {name: pose for name, pose in poses(after).items() if name in NAMES[:3]} == poses(before)
    # The new photos share the camera of the others.
    assert [list(camera.params) for camera in after.cameras.values()] == [
        list(camera.params) for camera in before.cameras.values()
    ]
    found = run_here("compare", tmp_path / "out", scene / "gt.json", "--json").json
    assert found["registered"] == 5
    assert found["auc"]["5"] > 0.5
    refined = run_here(
        "register", scene / "images", model, "-o", tmp_path / "out", "--refine-poses", "--quiet", *SETTINGS
    )
    assert refined.code == 0, refined.err
    moved = poses(read(tmp_path / "out"))
    for name, pose in poses(before).items():
        assert np.abs(np.subtract(moved[name], pose)).max() > 1e-9
        np.testing.assert_allclose(moved[name], pose, atol=0.1)


@pytest.mark.parametrize("command", ["triangulate", "register"])
def test_what_is_missing_is_named(command: str, scene: Path, tmp_path: Path, run_here: Command) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in NAMES[:2]:
        shutil.copy(scene / "images" / name, photos / name)
    result = run_here(command, photos, scene / "gt.json", "-o", tmp_path / "out", *SETTINGS)
    assert result.code == 2
    assert f"3 of 5 images of {scene / 'gt.json'} have no photo in {photos}: {', '.join(NAMES[2:])}" in result.err
    without = truth(scene, tmp_path / "poses.json", change=lambda entry: entry.pop("K"))
    result = run_here(command, scene / "images", without, "-o", tmp_path / "out", *SETTINGS)
    assert result.code == 2
    assert "poses but no cameras" in result.err
    both = ("--set", f"known.poses={scene / 'gt.json'}")
    result = run_here(command, scene / "images", scene / "gt.json", "-o", tmp_path / "out", *both, *SETTINGS)
    assert result.code == 2
    assert "known." in result.err
    assert not (tmp_path / "out").exists()
