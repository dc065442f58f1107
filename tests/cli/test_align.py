"""`align`: models brought to GPS and to known positions; what is said of the errors; what cannot be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
from PIL import ExifTags, Image
from scipy.spatial.transform import Rotation

from mast3r_sfm.colmap.model import ColmapModel, read_model
from mast3r_sfm.geometry.geodesy import LocalFrame
from mast3r_sfm.geometry.rigid import camera_centre, make_pose
from mast3r_sfm.georegistration import Reference, place
from mast3r_sfm.images.framing import stored_from_upright
from mast3r_sfm.types import Float64
from tests.loaders import ANY_LENS, broken_rules

Command = Callable[..., Any]
ORIGIN = LocalFrame(latitude_deg=55.7, longitude_deg=13.2, altitude_m=30.0)
# A frame as COLMAP leaves it: of any rotation, scale and place.
TURN, SCALE, SHIFT = Rotation.from_rotvec([0.7, -1.9, 1.1]).as_matrix(), 0.13, np.array([3.0, -8.0, 1.5])


def level_pose(place_m: Float64, heading_deg: float, orientation: int = 1) -> Float64:
    """cam_from_world of a level camera in a frame whose third axis points up."""
    heading = np.radians(heading_deg)
    forward = np.array([np.sin(heading), np.cos(heading), 0.0])
    right = np.array([np.cos(heading), -np.sin(heading), 0.0])
    upright = np.stack([right, [0.0, 0.0, -1.0], forward])
    stored = np.eye(3)
    stored[:2, :2] = stored_from_upright(orientation)
    rotation = stored @ upright
    return make_pose(rotation, -rotation @ place_m)


def write_model(folder: Path, poses: Mapping[str, Float64]) -> Path:
    """A model of the poses, in a frame of its own."""
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text("1 PINHOLE 120 90 100 100 60 45\n")
    (folder / "points3D.txt").write_text("1 1 2 3 10 20 30 0.5\n")
    lines = []
    for number, pose in enumerate(poses.values(), start=1):
        rotation = pose[:, :3] @ TURN.T
        translation = SCALE * pose[:, 3] - rotation @ SHIFT
        x, y, z, w = Rotation.from_matrix(rotation).as_quat()
        values = " ".join(f"{value:.17g}" for value in (w, x, y, z, *translation))
        lines.append(f"{number} {values} 1 {number}\n\n")
    (folder / "images.txt").write_text("".join(lines), encoding="utf-8")
    # A text model cannot have spaces in names.
    model = pycolmap.Reconstruction(str(folder))
    for number, name in enumerate(poses, start=1):
        model.images[number].name = name
    for path in folder.iterdir():
        path.unlink()
    model.write_binary(str(folder))
    return folder


def write_photo(path: Path, gps: Sequence[float] | None, *, altitude: bool = True, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    if gps is not None:
        tags = exif.get_ifd(ExifTags.IFD.GPSInfo)
        for degrees, tag, letters in ((gps[0], 1, "NS"), (gps[1], 3, "EW")):
            tags[tag] = letters[int(degrees < 0)]
            tags[tag + 1] = (abs(degrees), 0.0, 0.0)
        if altitude:
            tags[ExifTags.GPS.GPSAltitudeRef] = b"\x01" if gps[2] < 0 else b"\x00"
            tags[ExifTags.GPS.GPSAltitude] = abs(gps[2])
    Image.new("RGB", (120, 90), "grey").save(path, exif=exif)


def geodetic(places: Float64) -> Float64:
    """East, north and up of the origin to latitude, longitude, altitude."""
    return np.asarray(
        pycolmap.GPSTransform().enu_to_ellipsoid(places, ORIGIN.latitude_deg, ORIGIN.longitude_deg, ORIGIN.altitude_m)
    )


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A model, the photos that it was made from, and where these were taken."""

    model: Path
    photos: Path
    poses: dict[str, Float64]

    @property
    def places(self) -> dict[str, Float64]:
        return {name: camera_centre(pose) for name, pose in self.poses.items()}


def walk(
    root: Path, places: Float64, *, gps: Float64 | None = None, altitude: Sequence[bool] = (), turned: bool = False
) -> Walk:
    """Cameras at places [N, 3] (east, north, up), whose photos say that they were at `gps` [N, 3]."""
    poses = {}
    told = geodetic(places if gps is None else gps)
    for number, where in enumerate(places):
        name, orientation = f"day 1/{number:02d}.jpg", (1, 6, 8, 3)[number % 4] if turned else 1
        poses[name] = level_pose(where, 40.0 * number if turned else 37.0 * number, orientation)
        known = number >= len(altitude) or altitude[number]
        write_photo(root / "photos" / name, told[number], altitude=known, orientation=orientation)
    return Walk(model=write_model(root / "model", poses), photos=root / "photos", poses=poses)


def spread_places(number: int = 12, *, height: float = 8.0, seed: int = 1) -> Float64:
    return np.random.default_rng(seed).uniform([-50, -40, -height], [50, 40, height], (number, 3))


def offsets(out: Path, truth: Walk) -> Float64:
    """[N, 3] of the aligned cameras from the true places, less the offset of the frames' origins."""
    origin = json.loads((out / "align.json").read_text())["origin"]
    frame = LocalFrame(**{key: origin[key] for key in ("latitude_deg", "longitude_deg", "altitude_m")})
    poses = read_model(out).cam_from_world
    assert set(poses) == set(truth.poses)
    wanted = frame.local([tuple(position) for position in geodetic(np.array(list(truth.places.values()))).tolist()])
    return np.array([camera_centre(poses[name]) for name in truth.poses]) - wanted


def up_error_deg(out: Path, truth: Walk) -> float:
    """Degrees between up in the aligned model and the truth."""
    poses = read_model(out).cam_from_world
    ups = [poses[name][:, :3].T @ pose[:, :3] @ [0.0, 0.0, 1.0] for name, pose in truth.poses.items()]
    return float(np.degrees(np.arccos(np.clip(np.mean(ups, axis=0)[2], -1, 1))))


def test_a_model_comes_to_lie_where_gps_says(tmp_path: Path, run_here: Command) -> None:
    truth = walk(tmp_path, spread_places(), turned=True)
    out = tmp_path / "out"
    result = run_here("align", truth.model, out, "--image-path", truth.photos)
    assert result.code == 0, result.err
    assert "12 of 12 known positions agree" in result.out
    assert re.search(r"metres to the east, north and up of 55\.\d{7}°, 13\.\d{7}°, \d+\.\d m", result.out)
    assert re.search(r"median error 0\.000 m over all; of those that agree at most 0\.000 m", result.out)
    assert np.abs(offsets(out, truth)).max() < 0.005
    assert up_error_deg(out, truth) < 0.01
    report = json.loads((out / "align.json").read_text())
    assert report["unit"] == "m"
    assert report["scale"] == pytest.approx(1 / SCALE, rel=1e-4)
    assert report["max_error"] < 0.01
    assert report["levelled_by_cameras"] is False
    # The point moves with the cameras.
    rotation, point = np.array(report["rotation"]), np.array([1.0, 2.0, 3.0])
    moved = report["scale"] * rotation @ point + report["translation"]
    np.testing.assert_allclose(pycolmap.Reconstruction(str(out)).points3D[1].xyz, moved, atol=1e-9)


def test_wrong_positions_are_named_and_do_no_harm(tmp_path: Path, run_here: Command) -> None:
    places = spread_places(14)
    gps = places + np.random.default_rng(2).normal(0, 0.3, places.shape)
    gps[[1, 5, 9, 12]] += [[90, 0, 0], [0, -70, 20], [-60, 60, 0], [30, 30, -30]]
    truth = walk(tmp_path, places, gps=gps)
    result = run_here("align", truth.model, tmp_path / "out", "--image-path", truth.photos, "--json")
    assert result.code == 0, result.err
    report = result.json
    assert report == json.loads((tmp_path / "out" / "align.json").read_text())
    assert report["disagreeing"] == [f"day 1/{number:02d}.jpg" for number in (1, 9, 5, 12)]
    assert 40 < report["max_error"] < 100
    assert 0.1 < report["max_error_of_agreeing"] < 2
    assert 0.1 < report["median_error"] < 1.0
    assert np.linalg.norm(offsets(tmp_path / "out", truth), axis=1).max() < 1.0


@pytest.mark.parametrize("turned", [False, True])
def test_on_a_line_the_cameras_tell_which_way_is_up(turned: bool, tmp_path: Path, run_here: Command) -> None:
    """A walk along a street, with GPS that is four metres off: it says next to nothing of the roll."""
    steps = np.linspace(-80, 80, 20)
    rng = np.random.default_rng(5)
    places = np.stack([0.2 * steps, steps, 0.02 * steps], axis=1) + rng.normal(0, 0.3, (20, 3))
    truth = walk(tmp_path, places, gps=places + rng.normal(0, 4.0, places.shape), turned=turned)
    result = run_here("align", truth.model, tmp_path / "out", "--image-path", truth.photos)
    assert result.code == 0, result.err
    assert "which way is up was taken from how the cameras stand" in result.out
    assert up_error_deg(tmp_path / "out", truth) < 4
    assert np.linalg.norm(offsets(tmp_path / "out", truth), axis=1).max() < 7
    report = json.loads((tmp_path / "out" / "align.json").read_text())
    assert report["levelled_by_cameras"] is True
    assert 10 < report["tilt_deg"] < 90


def test_cameras_that_all_look_ahead_still_tell_which_way_is_up(tmp_path: Path) -> None:
    steps = np.linspace(0, 60, 10)
    places = np.stack([steps, 0.5 * steps, np.zeros(10)], axis=1)
    names = [f"{number}.jpg" for number in range(10)]
    poses = {name: level_pose(where, 63.4) for name, where in zip(names, places, strict=True)}
    model = read_model(write_model(tmp_path / "model", poses))
    found = place(model, Reference(positions=dict(zip(names, places, strict=True)), frame=ORIGIN))
    assert found.is_levelled
    assert found.tilt_deg == np.inf
    up = found.similarity.rotation @ TURN @ [0.0, 0.0, 1.0]
    np.testing.assert_allclose(up, [0, 0, 1], atol=1e-6)


def test_a_line_of_given_positions_is_refused(tmp_path: Path, run_here: Command) -> None:
    steps = np.linspace(0, 60, 8)
    truth = walk(tmp_path, np.stack([steps, 0.5 * steps, 0.1 * steps], axis=1))
    listed = tmp_path / "positions.txt"
    listed.write_text("".join(f"{name} {x} {y} {z}\n" for name, (x, y, z) in truth.places.items()))
    result = run_here("align", truth.model, tmp_path / "out", "--positions", listed)
    assert result.code == 2
    assert "too nearly on one line" in result.err
    assert not (tmp_path / "out").exists()


def test_the_uncertainty_of_the_tilt_is_what_it_says(tmp_path: Path) -> None:
    places = np.random.default_rng(8).uniform([-50, -8, -5], [50, 8, 5], (20, 3))
    names = [f"{number:02d}.jpg" for number in range(20)]
    poses = {name: level_pose(where, 31.0 * n) for n, (name, where) in enumerate(zip(names, places, strict=True))}
    model = read_model(write_model(tmp_path / "model", poses))
    line = np.linalg.svd(places - places.mean(axis=0))[2][0]
    turned, said = [], []
    for seed in range(60):
        noisy = places + np.random.default_rng(seed).normal(0, 1.0, places.shape)
        found = place(model, Reference(positions=dict(zip(names, noisy, strict=True))))
        turned.append(Rotation.from_matrix(found.similarity.rotation @ TURN).as_rotvec(degrees=True) @ line)
        said.append(found.tilt_deg)
    assert 0.6 < np.std(turned) / np.median(said) < 1.6
    assert 1 < np.median(said) < 4


def test_without_altitude_all_are_at_one_height(tmp_path: Path, run_here: Command) -> None:
    truth = walk(tmp_path, spread_places(10, height=0.2), altitude=[False] * 8 + [True] * 2)
    result = run_here("align", truth.model, tmp_path / "out", "--image-path", truth.photos)
    assert result.code == 0, result.err
    assert "note: 8 of 10 photos have no altitude: all are taken to have been at one height" in result.out
    report = json.loads((tmp_path / "out" / "align.json").read_text())
    assert report["origin"]["altitude_m"] == 0
    assert report["max_error"] < 0.5
    assert up_error_deg(tmp_path / "out", truth) < 0.5


def test_photos_without_altitude_are_not_used_where_others_have_it(tmp_path: Path, run_here: Command) -> None:
    truth = walk(tmp_path, spread_places(10), altitude=[False, True, False])
    result = run_here("align", truth.model, tmp_path / "out", "--image-path", truth.photos, "--json")
    assert result.code == 0, result.err
    assert (result.json["images"], result.json["compared"]) == (10, 8)
    assert result.json["notes"] == ["2 photos with a GPS position have no altitude, and are not used"]
    assert np.abs(offsets(tmp_path / "out", truth)).max() < 0.005


def test_known_positions_from_a_list_a_json_file_and_a_model(tmp_path: Path, run_here: Command) -> None:
    truth = walk(tmp_path, spread_places(7))
    listed, poses = tmp_path / "positions.txt", tmp_path / "gt.json"
    rows = [f"{name}   {x}\t{y} {z}" for name, (x, y, z) in truth.places.items()]
    listed.write_text("\n".join(["# name x y z", "", *rows, "unknown.jpg 1 2 3"]))
    images = {name: {"R": pose[:, :3].tolist(), "t": pose[:, 3].tolist()} for name, pose in truth.poses.items()}
    poses.write_text(json.dumps({"images": images}))
    aligned = []
    for number, positions in enumerate((listed, poses, tmp_path / "0")):
        out = tmp_path / str(number)
        result = run_here("align", truth.model, out, "--positions", positions, "--json")
        assert result.code == 0, result.err
        assert (result.json["compared"], result.json["unit"], result.json["origin"]) == (7, "", None)
        assert result.json["max_error"] < 1e-6
        aligned.append(read_model(out).cam_from_world)
    result = run_here("align", truth.model, tmp_path / "text", "--positions", tmp_path / "0", "--format", "text")
    assert result.code == 0
    assert (tmp_path / "text" / "images.txt").is_file()
    assert "have spaces, which COLMAP does not understand in text" in result.err
    for found in aligned:
        for name, pose in truth.poses.items():
            np.testing.assert_allclose(found[name], pose, atol=1e-6)


def test_a_reconstruction_comes_to_lie_in_the_truth(
    finished_run: Any, photo_folder: Path, example: Path, tmp_path: Path, run_here: Command
) -> None:
    result = run_here("align", finished_run.output, tmp_path / "out", "--positions", example / "gt.json", "--json")
    assert result.code == 0, result.err
    truth = json.loads((example / "gt.json").read_text())["images"]
    model: ColmapModel = read_model(tmp_path / "out")
    places = {
        name: camera_centre(np.column_stack([truth[name]["R"], truth[name]["t"]])) for name in model.cam_from_world
    }
    size = np.linalg.norm(np.ptp(list(places.values()), axis=0))
    found = {name: camera_centre(pose) for name, pose in model.cam_from_world.items()}
    errors = {name: float(np.linalg.norm(found[name] - places[name])) for name in places}
    assert errors == {name: pytest.approx(value, abs=1e-9) for name, value in result.json["errors"].items()}
    assert 0 < max(errors.values()) < 0.01 * size
    assert broken_rules(tmp_path / "out", photo_folder, ANY_LENS) == []


@pytest.mark.parametrize(("text", "part"), [
    ("a.jpg 1 2", "line 1: write a name and x y z"),
    ("# fine\nday 1/00.jpg 1 2 x", "line 2: write a name and x y z"),
    ("day 1/00.jpg 1 2 nan", "line 1: write a name and x y z"),
    ("day 1/00.jpg 1 2 3\nday 1/00.jpg 1 2 3", "line 2: day 1/00.jpg stands there twice"),
    ("day 1/00.jpg 1 2 3\nother.jpg 4 5 6", "1 of the model's 7 images have a known position"),
    ("", "0 of the model's 7 images have a known position"),
    (b"\xff\xfe\x00", "it is no text in UTF-8"),
])  # fmt: skip
def test_lists_that_cannot_be_used(text: str | bytes, part: str, tmp_path: Path, run_here: Command) -> None:
    truth = walk(tmp_path, spread_places(7))
    (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run_here("align", truth.model, tmp_path / "out", "--positions", tmp_path / "list.txt")
    assert result.code == 2
    assert part in result.err
    assert not (tmp_path / "out").exists()


def test_positions_that_do_not_fit_are_refused(tmp_path: Path, run_here: Command) -> None:
    places = spread_places(16)
    truth = walk(tmp_path, places, gps=np.random.default_rng(4).normal(0, 5, places.shape))
    result = run_here("align", truth.model, tmp_path / "out", "--image-path", truth.photos)
    assert result.code == 2
    assert "the known positions do not fit the model" in result.err
    same = tmp_path / "same.txt"
    same.write_text("".join(f"{name} 1 2 3\n" for name in truth.poses))
    result = run_here("align", truth.model, tmp_path / "out", "--positions", same)
    assert result.code == 2
    assert "coincide" in result.err


def test_photos_that_tell_no_positions(tmp_path: Path, run_here: Command) -> None:
    truth = walk(tmp_path, spread_places(6))
    for name in list(truth.poses)[2:]:
        write_photo(truth.photos / name, None)
    (truth.photos / "day 1/01.jpg").write_bytes(b"no photo")
    result = run_here("align", truth.model, tmp_path / "out", "--image-path", truth.photos)
    assert result.code == 2
    assert "1 of the model's 6 photos have a GPS position" in result.err
    (tmp_path / "empty").mkdir()
    for folder, part in (("empty", "none of the model's photos is in"), ("nowhere", "does not exist")):
        result = run_here("align", truth.model, tmp_path / "out", "--image-path", tmp_path / folder)
        assert result.code == 2
        assert part in result.err


def test_what_stands_in_the_output_is_not_lost(tmp_path: Path, run_here: Command) -> None:
    truth = walk(tmp_path, spread_places(6))
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    arguments = ("align", truth.model, out, "--image-path", truth.photos)
    result = run_here(*arguments, "--overwrite")
    assert result.code == 2
    assert "holds other things than a model, such as notes.txt" in result.err
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert run_here(*arguments).code == 0
    before = sorted(out.iterdir())
    result = run_here(*arguments)
    assert result.code == 2
    assert "add --overwrite" in result.err
    assert run_here(*arguments, "--overwrite", "--format", "colmap-3.8").code == 0
    assert {path.name for path in before} - {path.name for path in out.iterdir()} == {"rigs.bin", "frames.bin"}
    (tmp_path / "file").write_text("")
    result = run_here("align", truth.model, tmp_path / "file", "--image-path", truth.photos)
    assert (result.code, "is a file" in result.err) == (2, True)


def test_one_model_and_one_reference(tmp_path: Path, run_here: Command) -> None:
    truth = walk(tmp_path, spread_places(6))
    for number in "01":
        write_model(tmp_path / "run" / "sparse" / number, truth.poses)
    result = run_here("align", tmp_path / "run", tmp_path / "out", "--image-path", truth.photos)
    assert result.code == 2
    assert "holds 2 models" in result.err
    assert "name the folder of one of them" in result.err
    for more in ([], ["--image-path", truth.photos, "--positions", "x.txt"]):
        result = run_here("align", truth.model, tmp_path / "out", *more)
        assert result.code == 2
        assert "say what to align to" in result.err
    result = run_here("align", truth.model, tmp_path / "out", "--image-path", truth.photos, "--format", "xml")
    assert (result.code, "export.format = 'xml'" in result.err) == (2, True)
