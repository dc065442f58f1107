from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mast3r_sfm.errors import InputError, ShapeError
from mast3r_sfm.evaluation.truth import Truth, read_truth_json, truth_from_poses

TURN = [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def example() -> dict[str, Any]:
    return {
        "images": {
            "b.jpg": {"R": TURN, "t": [1, 2, 3], "K": [[500, 0, 319.5], [0, 500, 239.5], [0, 0, 1]]},
            "sub/a.jpg": {"R": np.eye(3).tolist(), "t": [0, 0, 0], "scene": "other"},
        },
        "unrelated": ["z.jpg", "y.jpg"],
    }


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_reads_poses_scenes_and_intrinsics(tmp_path: Path) -> None:
    truth = read_truth_json(write(tmp_path / "gt.json", example()))
    np.testing.assert_allclose(truth.cam_from_world["b.jpg"], np.column_stack([TURN, [1, 2, 3]]), atol=1e-12)
    assert truth.scene == {"b.jpg": "", "sub/a.jpg": "other"}
    assert truth.unrelated == ("y.jpg", "z.jpg")
    assert list(truth.intrinsics) == ["b.jpg"]
    # The file's first pixel has its centre at (0, 0), ours at (0.5, 0.5).
    np.testing.assert_array_equal(truth.intrinsics["b.jpg"], [[500, 0, 320], [0, 500, 240], [0, 0, 1]])


def test_rounded_rotations_become_rotations(tmp_path: Path) -> None:
    data = example()
    angle = 0.3
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    data["images"]["b.jpg"]["R"] = rotation.round(4).tolist()
    found = read_truth_json(write(tmp_path / "gt.json", data)).cam_from_world["b.jpg"][:, :3]
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-14)
    np.testing.assert_allclose(found, rotation, atol=1e-4)


def without(key: str) -> dict[str, Any]:
    data = example()
    del data["images"]["b.jpg"][key]
    return data


def changed(key: str, value: object) -> dict[str, Any]:
    data = example()
    data["images"]["b.jpg"][key] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected an object"),
        ({"frames": []}, '"images" must map'),
        ({"images": {"a": {}}}, "two or more"),
        ({"images": {"a": 1, "b": 2}}, r"images\['a'\] must be an object"),
        (without("R"), r"images\['b.jpg'\]\.R is missing"),
        (without("t"), r"\.t is missing"),
        (changed("R", [[1, 0], [0, 1]]), r"\.R must hold 3×3 numbers"),
        (changed("R", [[1, 0, 0], [0, 1], [0, 0, 1]]), r"\.R must hold 3×3 numbers"),
        (changed("R", (2 * np.eye(3)).tolist()), "is no rotation matrix"),
        (changed("R", np.diag([1, 1, -1]).tolist()), "determinant -1"),
        (changed("t", ["far", 0, 0]), r"\.t must hold 3 numbers"),
        (changed("t", [float("nan"), 0, 0]), r"\.t holds NaN"),
        (changed("K", [500, 320, 240]), r"\.K must hold 3×3 numbers"),
        (example() | {"unrelated": "z.jpg"}, "must be a list"),
        (example() | {"unrelated": ["b.jpg"]}, "both images and unrelated"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, data: object, message: str) -> None:
    path = write(tmp_path / "gt.json", data)
    with pytest.raises(InputError, match=message) as caught:
        read_truth_json(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the truth"):
        read_truth_json(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"images": {')
    with pytest.raises(InputError, match="not valid JSON"):
        read_truth_json(tmp_path / "broken.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(InputError, match="not valid JSON"):
        read_truth_json(tmp_path / "binary.json")


def test_truth_from_poses() -> None:
    truth = truth_from_poses({"b": np.eye(3, 4, dtype=np.float32), "a": np.eye(3, 4)})
    assert truth.names_by_scene == {"": ("a", "b")}
    assert truth.cam_from_world["b"].dtype == np.float64
    with pytest.raises(InputError, match="two or more"):
        truth_from_poses({"a": np.eye(3, 4)})
    with pytest.raises(ShapeError, match=r"pose of b .*\(4, 4\)"):
        truth_from_poses({"a": np.eye(3, 4), "b": np.eye(4)})


def test_truth_is_validated() -> None:
    poses = {"a": np.eye(3, 4), "b": np.eye(3, 4)}
    with pytest.raises(ShapeError, match="same images"):
        Truth(cam_from_world=poses, scene={"a": ""})
    with pytest.raises(ShapeError, match="a has a pose and is unrelated"):
        Truth(cam_from_world=poses, scene=dict.fromkeys(poses, ""), unrelated=("a",))


def test_restriction(tmp_path: Path) -> None:
    truth = read_truth_json(write(tmp_path / "gt.json", example()))
    part = truth.restricted_to({"b.jpg", "z.jpg", "not there"})
    assert set(part.cam_from_world) == set(part.scene) == set(part.intrinsics) == {"b.jpg"}
    assert part.unrelated == ("z.jpg",)


@pytest.mark.parametrize(
    ("name", "scenes", "unrelated"),
    [
        ("strecha_fountain_p11", {"": 11}, 0),
        ("mix_fountain_herzjesu8", {"a": 11, "b": 8}, 0),
        ("junk_herzjesu8", {"a": 8}, 5),
        ("synth_pure_rotation_b", {"": 12}, 0),
    ],
)
def test_real_sets(data_dir: Path, name: str, scenes: dict[str, int], unrelated: int) -> None:
    folder = data_dir / name
    if not folder.is_dir():
        pytest.skip(f"{data_dir} has no set {name}")
    truth = read_truth_json(folder / "gt.json")
    assert {scene: len(names) for scene, names in truth.names_by_scene.items()} == scenes
    assert len(truth.unrelated) == unrelated
    for image in [*truth.scene, *truth.unrelated]:
        assert (folder / "images" / image).is_file()
