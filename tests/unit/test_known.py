"""What files tell of cameras and poses, and which photos they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest

from mast3r_sfm.config import Config, KnownConfig
from mast3r_sfm.errors import ConfigError, InputError
from mast3r_sfm.known import Known, known_keys, match_names, resolve_known
from mast3r_sfm.known_files import read_known_file
from mast3r_sfm.types import ImageRecord, ImageSet
from tests.exact import Listener

K = [[600.0, 0.0, 319.5], [0.0, 610.0, 239.5], [0.0, 0.0, 1.0]]
QUARTER = [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def photo_set(*names: str, size: tuple[int, int] = (640, 480), **sizes: tuple[int, int]) -> ImageSet:
    records = [
        ImageRecord(
            name=name,
            width_px=sizes.get(name[0], size)[0],
            height_px=sizes.get(name[0], size)[1],
            sha256=name,
            camera_group="some",
        )
        for name in sorted(names)
    ]
    return ImageSet(root=Path("photos"), records=tuple(records))


def truth(path: Path, *names: str, **values: Any) -> Path:
    entry = {"R": QUARTER, "t": [1, 2, 3], "K": K, "width": 640, "height": 480, **values}
    kept = {key: value for key, value in entry.items() if value is not None}
    path.write_text(json.dumps({"images": dict.fromkeys(names, kept)}), encoding="utf-8")
    return path


def with_cameras(path: Path, photos: ImageSet, listener: Listener | None = None, **values: Any) -> Known:
    return resolve_known(KnownConfig(intrinsics=str(path), **values), photos, listener or Listener())


def with_poses(path: Path, photos: ImageSet, listener: Listener | None = None, **values: Any) -> Known:
    return resolve_known(KnownConfig(poses=str(path), **values), photos, listener or Listener())


def camera_of(known: Known, name: str) -> Any:
    record = next(record for record in known.photos.records if record.name == name)
    return known.cameras.get(record.camera_group)


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """write_model("a.jpg", "b.jpg", ending="bin"): a COLMAP model of images with known cameras and poses."""

    def write(*names: str, ending: str = "bin", size: tuple[int, int] = (640, 480), cameras: int = 1) -> Path:
        model = pycolmap.Reconstruction()
        for number in range(1, cameras + 1):
            camera = pycolmap.Camera(
                camera_id=number,
                model="OPENCV",
                width=size[0],
                height=size[1],
                params=[600.0 + number, 610.0, 320.0, 240.0, -0.1, 0.01, 0.0, 0.0],
            )
            model.add_camera_with_trivial_rig(camera)
        for number, name in enumerate(names, start=1):
            image = pycolmap.Image(name=name, camera_id=(number - 1) % cameras + 1, image_id=number)
            quaternion = np.array([0.1 * number, 0.2, 0.3, 0.9])
            rotation = pycolmap.Rotation3d(quaternion / np.linalg.norm(quaternion))
            model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(rotation, np.array([number, 2.0, 3.0])))
        folder = tmp_path / "given_model"
        folder.mkdir(exist_ok=True)
        (model.write_binary if ending == "bin" else model.write_text)(str(folder))
        return folder

    return write


def test_the_truth_tells_cameras_in_pixels_of_colmap(tmp_path: Path) -> None:
    known = with_cameras(truth(tmp_path / "gt.json", "a.jpg", "b.jpg"), photo_set("a.jpg", "b.jpg"))
    camera = camera_of(known, "a.jpg")
    assert camera.model == "PINHOLE"
    assert camera.params.tolist() == [600, 610, 320, 240]
    assert camera.is_fixed
    assert camera.is_given
    assert camera.focal_is_known
    # Photos of one camera share it.
    assert len(known.cameras) == 1
    assert known.poses is None


def test_distortion_makes_it_opencv(tmp_path: Path) -> None:
    path = truth(tmp_path / "gt.json", "a.jpg", "b.jpg", dist=[-0.1, 0.01, 0.001, 0.002])
    camera = camera_of(with_cameras(path, photo_set("a.jpg", "b.jpg")), "b.jpg")
    assert camera.model == "OPENCV"
    assert camera.params[4:].tolist() == [-0.1, 0.01, 0.001, 0.002]


def test_a_prior_is_not_fixed(tmp_path: Path) -> None:
    path = truth(tmp_path / "gt.json", "a.jpg", "b.jpg")
    known = with_cameras(path, photo_set("a.jpg", "b.jpg"), intrinsics_mode="prior")
    camera = camera_of(known, "a.jpg")
    assert not camera.is_fixed
    assert camera.is_given


@pytest.mark.parametrize("ending", ["bin", "txt"])
def test_a_model_tells_cameras_and_poses_to_the_bit(write_model: Callable[..., Path], ending: str) -> None:
    folder = write_model("a.jpg", "b.jpg", ending=ending)
    model = pycolmap.Reconstruction(str(folder))
    photos = photo_set("a.jpg", "b.jpg")
    known = with_poses(folder, photos)
    assert known.poses is not None
    assert known.poses.images.tolist() == [0, 1]
    for row, number in enumerate((1, 2)):
        assert known.poses.params[row].tolist() == model.image(number).cam_from_world().params.tolist()
    camera = camera_of(with_cameras(folder, photos), "b.jpg")
    assert camera.model == "OPENCV"
    assert camera.params.tolist() == model.camera(1).params.tolist()
    assert with_poses(folder, photos, poses_mode="prior").poses.is_fixed is False  # type: ignore[union-attr]


@pytest.mark.parametrize("ending", ["bin", "txt"])
def test_a_list_of_cameras_goes_by_size(write_model: Callable[..., Path], ending: str) -> None:
    path = write_model("a.jpg", "b.jpg", ending=ending) / f"cameras.{ending}"
    listener = Listener()
    known = with_cameras(path, photo_set("a.jpg", "b.jpg", "z.jpg", z=(800, 400)), listener)
    assert camera_of(known, "a.jpg").params[0] == 601
    assert camera_of(known, "z.jpg") is None
    assert any("z.jpg" in note for note in listener.notes)
    with pytest.raises(InputError, match="640×480 pixels, but no photo has such a size"):
        with_cameras(path, photo_set("a.jpg", "b.jpg", size=(800, 400)))


def test_two_cameras_of_one_size_are_ambiguous(write_model: Callable[..., Path]) -> None:
    folder = write_model("a.jpg", "b.jpg", cameras=2)
    with pytest.raises(InputError, match="2 cameras for photos of 640×480"):
        with_cameras(folder / "cameras.bin", photo_set("a.jpg", "b.jpg"))
    # The model says which is whose.
    known = with_cameras(folder, photo_set("a.jpg", "b.jpg"))
    assert [camera_of(known, name).params[0] for name in ("a.jpg", "b.jpg")] == [601, 602]


def test_nerfstudio_tells_cameras(tmp_path: Path) -> None:
    path = tmp_path / "transforms.json"
    common = {"w": 640, "h": 480, "fl_x": 600.0, "fl_y": 610.0, "cx": 320.5, "cy": 240.5, "k1": -0.1, "p2": 0.01}
    frames = [{"file_path": "./images/a.jpg"}, {"file_path": "images/b.jpg", "fl_x": 650.0}]
    path.write_text(json.dumps({**common, "frames": frames}), encoding="utf-8")
    known = with_cameras(path, photo_set("a.jpg", "b.jpg"))
    assert camera_of(known, "a.jpg").model == "OPENCV"
    assert camera_of(known, "a.jpg").params.tolist() == [600, 610, 320.5, 240.5, -0.1, 0, 0, 0.01]
    assert camera_of(known, "b.jpg").params[0] == 650
    with pytest.raises(InputError, match="tells no pose"):
        with_poses(path, photo_set("a.jpg", "b.jpg"))
    path.write_text(json.dumps({key: value for key, value in common.items() if key[0] not in "kp"}), encoding="utf-8")
    assert camera_of(with_cameras(path, photo_set("a.jpg", "b.jpg")), "b.jpg").model == "PINHOLE"
    path.write_text(json.dumps({"camera_model": "OTHER", "frames": frames, **common}), encoding="utf-8")
    with pytest.raises(InputError, match="camera_model 'OTHER'"):
        read_known_file(path)


def test_photos_that_are_not_named_keep_their_groups(tmp_path: Path) -> None:
    path, listener = truth(tmp_path / "gt.json", "a.jpg", "gone.jpg"), Listener()
    photos = photo_set("a.jpg", "b.jpg")
    known = with_cameras(path, photos, listener)
    assert camera_of(known, "b.jpg") is None
    assert known.photos.records[1].camera_group == "some"
    assert known.photos.records[0].camera_group != "some"
    assert any("gone.jpg" in note for note in listener.notes)
    assert any("b.jpg" in note for note in listener.notes)
    shared = with_cameras(path, photos, intrinsics_of_groups=True)
    assert camera_of(shared, "b.jpg") is camera_of(shared, "a.jpg")


@pytest.mark.parametrize(
    ("size", "focal"), [((640, 480), 600.0), ((1280, 960), 1200.0), ((320, 240), 300.0), ((107, 80), 600.0 * 107 / 640)]
)
def test_cameras_are_scaled_to_photos_of_their_shape(tmp_path: Path, size: tuple[int, int], focal: float) -> None:
    path, listener = truth(tmp_path / "gt.json", "a.jpg", "b.jpg"), Listener()
    camera = camera_of(with_cameras(path, photo_set("a.jpg", "b.jpg", size=size), listener), "a.jpg")
    assert camera.params[0] == pytest.approx(focal)
    assert camera.params[2:4] == pytest.approx([size[0] / 2, size[1] / 2])
    assert (camera.width_px, camera.height_px) == size
    assert any("scaled" in note for note in listener.notes) == (size != (640, 480))


@pytest.mark.parametrize(
    ("size", "says"), [((640, 483), "only to photos of the same shape"), ((480, 640), "before any EXIF rotation")]
)
def test_other_shapes_are_refused(tmp_path: Path, size: tuple[int, int], says: str) -> None:
    path = truth(tmp_path / "gt.json", "a.jpg", "b.jpg")
    with pytest.raises(InputError, match=says):
        with_cameras(path, photo_set("a.jpg", "b.jpg", size=size))


def test_names_mean_photos_by_their_ends() -> None:
    assert match_names(["a.jpg"], ["a.jpg", "x/a.jpg"]) == {"a.jpg": "a.jpg"}
    assert match_names(["images/x/a.jpg"], ["x/a.jpg", "y/a.jpg"]) == {"images/x/a.jpg": "x/a.jpg"}
    assert match_names(["a.jpg"], ["x/a.jpg", "y/b.jpg"]) == {"a.jpg": "x/a.jpg"}
    assert match_names(["a.jpg"], ["x/a.jpg", "y/a.jpg"]) == {}
    assert match_names(["p/a.jpg", "q/a.jpg"], ["x/a.jpg"]) == {}
    assert match_names(["dir\\a.jpg"], ["a.jpg"]) == {"dir\\a.jpg": "a.jpg"}


def test_poses_of_some_of_the_photos(tmp_path: Path) -> None:
    path, listener = truth(tmp_path / "gt.json", "b.jpg", "c.jpg", "gone.jpg", K=None), Listener()
    known = with_poses(path, photo_set("a.jpg", "b.jpg", "c.jpg"), listener)
    assert known.poses is not None
    assert known.poses.images.tolist() == [1, 2]
    np.testing.assert_allclose(known.poses.cam_from_world[0], np.column_stack([QUARTER, [1, 2, 3]]), atol=1e-15)
    assert any("gone.jpg" in note for note in listener.notes)
    assert "2 of 2 photos with a known pose" in known.describe(["a.jpg", "b.jpg", "c.jpg"])
    assert "a.jpg" in known.describe(["a.jpg", "b.jpg", "c.jpg"])
    only = with_poses(path, photo_set("a.jpg", "b.jpg", "c.jpg"), only_posed=True)
    assert only.photos.names == ("b.jpg", "c.jpg")
    assert [left.name for left in only.photos.left_out] == ["a.jpg"]
    assert only.poses is not None
    assert only.poses.images.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "absent.json", "there is no file"),
        (lambda folder: truth(folder / "gt.json", "x.jpg", "y.jpg"), "names none of the photos"),
        (lambda folder: truth(folder / "gt.json", "a.jpg", K=None), "tells no camera"),
        (lambda folder: truth(folder / "gt.json", "a.jpg", K=[[1, 2, 3]]), r"K must hold 3×3"),
        (lambda folder: truth(folder / "gt.json", "a.jpg", K=[[600, 9, 1], [0, 600, 1], [0, 0, 1]]), "skew"),
        (lambda folder: truth(folder / "gt.json", "a.jpg", width=None), "must hold width and height"),
        (lambda folder: truth(folder / "gt.json", "a.jpg", dist=[1]), "dist must hold 4 numbers"),
        (lambda folder: folder, "holds no COLMAP model"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, make: Callable[[Path], Path], says: str) -> None:
    with pytest.raises(InputError, match=says):
        with_cameras(make(tmp_path), photo_set("a.jpg", "b.jpg"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cameras.txt", b"1 OPENCV 640 480 600 600 320 240\n", "must be"),
        ("cameras.txt", b"1 NONSENSE 640 480 600\n", "no camera model 'NONSENSE'"),
        ("cameras.txt", b"1 PINHOLE 640\n", "holds no cameras"),
        ("cameras.txt", b"# nothing\n", "holds no camera"),
        ("cameras.bin", b"\1\0\0\0", "holds no cameras"),
        ("cameras.bin", b"\xff" * 40, "holds no cameras"),
        ("images.txt", b"", "is not a list of cameras"),
        ("gt.json", b"{", "not valid JSON"),
        ("gt.json", b"{}", "neither"),
        ("poses.npy", b"", "no form"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        with_cameras(tmp_path / name, photo_set("a.jpg", "b.jpg"))


def test_scenes_have_no_frame_in_common(tmp_path: Path) -> None:
    path = tmp_path / "gt.json"
    entry = {"R": QUARTER, "t": [1, 2, 3]}
    images = {"a.jpg": {**entry, "scene": "one"}, "b.jpg": {**entry, "scene": "two"}}
    path.write_text(json.dumps({"images": images}), encoding="utf-8")
    with pytest.raises(InputError, match="2 scenes"):
        with_poses(path, photo_set("a.jpg", "b.jpg"))


def test_keys_go_by_content(tmp_path: Path) -> None:
    photos = photo_set("a.jpg", "b.jpg")
    one = with_cameras(truth(tmp_path / "one.json", "a.jpg", "b.jpg"), photos)
    same = with_cameras(truth(tmp_path / "two.json", "a.jpg", "b.jpg"), photos)
    other = with_cameras(truth(tmp_path / "three.json", "a.jpg", "b.jpg", dist=[0.1, 0, 0, 0]), photos)
    part = with_cameras(truth(tmp_path / "four.json", "a.jpg"), photos)
    assert one.cameras_key == same.cameras_key
    assert len({repr(known.cameras_key) for known in (one, other, part)}) == 3
    assert known_keys("key", Known(photos=photos).cameras_key) == "key"
    assert known_keys("key", one.cameras_key) == known_keys("key", same.cameras_key) != "key"
    first = with_poses(truth(tmp_path / "five.json", "a.jpg", "b.jpg"), photos)
    moved = with_poses(truth(tmp_path / "six.json", "a.jpg", "b.jpg", t=[1, 2, 4]), photos)
    prior = with_poses(tmp_path / "five.json", photos, poses_mode="prior")
    assert len({repr(known.poses_key) for known in (first, moved, prior)}) == 3


def test_settings_that_need_a_file_say_so() -> None:
    for setting in ("intrinsics_mode=prior", "poses_mode=prior", "intrinsics_of_groups=true", "only_posed=true"):
        with pytest.raises(ConfigError, match="a file"):
            Config().with_overrides([f"known.{setting}"])
    assert Config().with_overrides(["known.poses=x", "known.poses_mode=prior"]).known.poses_mode == "prior"
