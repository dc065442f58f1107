"""COLMAP models on disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from PIL import Image

from mast3r_sfm.colmap.mapper import Mapper, MapperSettings
from mast3r_sfm.colmap.model import ColmapModel, read_model, write_models
from mast3r_sfm.config import MapConfig
from mast3r_sfm.errors import InputError
from mast3r_sfm.geometry.rigid import camera_centre, transform_points
from mast3r_sfm.types import Bool, Float64, Tracks
from tests.exact import HEIGHT_PX, WIDTH_PX, ring


@pytest.fixture
def model(make_database: Callable[..., Path]) -> ColmapModel:
    scene = ring(4, turn_deg=60, points=60)
    settings = MapperSettings(config=MapConfig(), pixel_scale=1.0, threads=1, seed=0)
    return Mapper(make_database(scene), settings).build(dict(enumerate(scene.poses)))


def assert_same(one: ColmapModel, two: ColmapModel) -> None:
    assert list(one.cam_from_world) == list(two.cam_from_world)
    for name, pose in one.cam_from_world.items():
        np.testing.assert_allclose(pose, two.cam_from_world[name], atol=1e-12)
        for left, right in zip(vars(one.cameras[name]).values(), vars(two.cameras[name]).values(), strict=True):
            np.testing.assert_array_equal(left, right)
    assert one.summary("here") == two.summary("here")
    assert one.observed_share == two.observed_share


def test_what_is_written_is_read(model: ColmapModel, tmp_path: Path) -> None:
    model.write(tmp_path / "0")
    assert_same(model, read_model(tmp_path / "0"))
    names = {file.name for file in (tmp_path / "0").iterdir()}
    assert {"cameras.bin", "images.bin", "points3D.bin"} <= names


def test_text_models_are_read(model: ColmapModel, tmp_path: Path) -> None:
    model.write(tmp_path / "0")
    (tmp_path / "text").mkdir()
    pycolmap.Reconstruction(str(tmp_path / "0")).write_text(str(tmp_path / "text"))
    read = read_model(tmp_path / "text")
    assert list(read.cam_from_world) == list(model.cam_from_world)
    assert read.num_points == model.num_points


def test_the_summary_counts_what_is_there(model: ColmapModel) -> None:
    summary = model.summary("sparse/3")
    assert summary.path == "sparse/3"
    assert summary.images == tuple(f"left/{image:02d}.jpg" for image in range(4))
    assert 50 < summary.points <= 60
    assert summary.observations == pytest.approx(summary.points * summary.mean_track_length)
    assert summary.mean_track_length == pytest.approx(4, abs=0.2)
    assert 0 <= summary.mean_reprojection_error_px < 0.05
    assert model.observed_share == pytest.approx(summary.observations / 240)


def test_writing_replaces_what_stood_there(model: ColmapModel, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "stale.txt").write_text("old")
    model.write(tmp_path / "0")
    assert not (tmp_path / "0" / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0"]


def test_models_are_numbered_and_stale_ones_removed(model: ColmapModel, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    for name in ("0", "1", "7", "notes"):
        (sparse / name).mkdir(parents=True)
        (sparse / name / "stale.txt").write_text("old")
    (sparse / "12").write_text("a file")
    summaries = write_models([model, model], sparse)
    assert [summary.path for summary in summaries] == ["sparse/0", "sparse/1"]
    # What is not a model of ours stays.
    assert sorted(path.name for path in sparse.iterdir()) == ["0", "1", "12", "notes"]
    for number in "01":
        assert_same(model, read_model(sparse / number))
    write_models([model], sparse)
    assert sorted(path.name for path in sparse.iterdir()) == ["0", "12", "notes"]
    assert write_models([], sparse) == []
    assert sorted(path.name for path in sparse.iterdir()) == ["12", "notes"]


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no COLMAP model"):
        read_model(tmp_path)
    with pytest.raises(InputError, match="holds no COLMAP model"):
        read_model(tmp_path / "missing")


@pytest.mark.parametrize("file", ["cameras.bin", "images.bin", "points3D.bin"])
def test_a_model_that_lacks_a_file(model: ColmapModel, tmp_path: Path, file: str) -> None:
    model.write(tmp_path / "0")
    (tmp_path / "0" / file).unlink()
    with pytest.raises(InputError, match="COLMAP model"):
        read_model(tmp_path / "0")


READ = """
import resource, sys
from pathlib import Path

from mast3r_sfm.colmap.model import read_model
from mast3r_sfm.errors import InputError

# A count read from a broken file must not be believed: without this limit it would take all memory there is.
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_model(folder)
        print(folder.name, "was read")
    except InputError as error:
        print(folder.name, "refused" if str(folder) in str(error) else f"unclear: {error}")
    except Exception as error:
        print(folder.name, repr(error))
"""


def test_a_broken_model_is_refused(model: ColmapModel, tmp_path: Path) -> None:
    expected = []
    for file in ("cameras", "images", "points3D"):
        for damage in ("empty", "half", "noise"):
            folder = tmp_path / "models" / f"{file} {damage}"
            folder.parent.mkdir(exist_ok=True)
            model.write(folder)
            path = folder / f"{file}.bin"
            data = path.read_bytes()
            noise = np.random.default_rng(0).bytes(len(data))
            path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "noise": noise}[damage])
            expected.append(f"{folder.name} refused")
    process = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "models")], capture_output=True, text=True, check=False, timeout=120
    )
    assert process.stdout.splitlines() == expected, process.stderr


def test_compression_works_after_our_import_of_pycolmap() -> None:
    code = "import mast3r_sfm.colmap.model, zlib; print(len(zlib.decompress(zlib.compress(bytes(100_000)))))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert process.stdout.split() == ["100000"], process.stderr


def test_points_take_the_colours_of_the_photos(model: ColmapModel, tmp_path: Path) -> None:
    (tmp_path / "left").mkdir()
    for image in range(4):
        Image.new("RGB", (WIDTH_PX, HEIGHT_PX), (200, 100, 50)).save(tmp_path / "left" / f"{image:02d}.png")
        (tmp_path / "left" / f"{image:02d}.png").rename(tmp_path / "left" / f"{image:02d}.jpg")
    model.colour(tmp_path)
    model.write(tmp_path / "0")
    colours = {tuple(point.color) for point in pycolmap.Reconstruction(str(tmp_path / "0")).points3D.values()}
    assert colours == {(200, 100, 50)}
    model.write_ply(tmp_path / "points.ply")
    header = (tmp_path / "points.ply").read_bytes()[:200].decode("ascii", "replace")
    assert header.startswith("ply")
    assert f"element vertex {model.num_points}" in header


def observations(model: ColmapModel) -> dict[tuple[int, int], tuple[int, tuple[float, float]]]:
    """Point and pixel of every observation, by image id and keypoint, as pycolmap has them."""
    reconstruction = model.reconstruction
    return {
        (element.image_id, element.point2D_idx): (
            number,
            tuple(reconstruction.image(element.image_id).point2D(element.point2D_idx).xy),
        )
        for number, point in reconstruction.points3D.items()
        for element in point.track.elements
    }


def test_tracks_hold_all_observations(model: ColmapModel) -> None:
    tracks = model.tracks()
    expected = observations(model)
    numbers = sorted(model.reconstruction.point3D_ids())
    found = {
        (image + 1, keypoint): (numbers[point], tuple(xy))
        for point, image, keypoint, xy in zip(
            tracks.point.tolist(), tracks.image.tolist(), tracks.keypoint.tolist(), tracks.xy.tolist(), strict=True
        )
    }
    assert found == expected
    assert len(tracks.point) == len(expected) > 200
    assert (np.diff(tracks.point) >= 0).all()
    xyz = [model.reconstruction.point3D(number).xyz for number in numbers]
    np.testing.assert_array_equal(tracks.points, xyz)


def test_an_empty_model_has_no_tracks() -> None:
    tracks = ColmapModel(pycolmap.Reconstruction()).tracks()
    assert tracks.points.shape == (0, 3)
    assert tracks.xy.shape == (0, 2)


def test_keypoints_are_all_of_an_images(model: ColmapModel) -> None:
    keypoints, tracks = model.keypoints(), model.tracks()
    assert sorted(keypoints) == [0, 1, 2, 3]
    for image, xy in keypoints.items():
        assert xy.shape == (60, 2)
        mine = tracks.image == image
        np.testing.assert_array_equal(xy[tracks.keypoint[mine]], tracks.xy[mine])


def test_moved_observations_stand_where_they_were_moved(model: ColmapModel) -> None:
    tracks, before = model.tracks(), model.keypoints()
    rng = np.random.default_rng(0)
    xy = tracks.xy + rng.normal(size=tracks.xy.shape)
    moved = model.moved(tracks, xy, np.ones(len(xy), bool))
    again = moved.tracks()
    np.testing.assert_array_equal(again.xy, xy)
    for name in ("points", "point", "image", "keypoint"):
        np.testing.assert_array_equal(getattr(again, name), getattr(tracks, name))
    # The model itself is as it was, and so are keypoints that are no observations.
    np.testing.assert_array_equal(model.tracks().xy, tracks.xy)
    for image, after in moved.keypoints().items():
        others = np.setdiff1d(np.arange(len(after)), tracks.keypoint[tracks.image == image])
        np.testing.assert_array_equal(after[others], before[image][others])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_what_is_not_kept_is_no_observation(model: ColmapModel, share: float) -> None:
    """A point that keeps one observation or none goes, and the others keep theirs."""
    tracks, before = model.tracks(), observations(model)
    rng = np.random.default_rng(1)
    kept = rng.random(len(tracks.xy)) < share
    moved = model.moved(tracks, tracks.xy + 1, kept)
    numbers = np.array(sorted(model.reconstruction.point3D_ids()))
    stays = kept & (np.bincount(tracks.point[kept], minlength=len(numbers)) > 1)[tracks.point]
    expected = {
        (image + 1, keypoint): (number, tuple(xy))
        for image, keypoint, number, xy in zip(
            tracks.image[stays].tolist(),
            tracks.keypoint[stays].tolist(),
            numbers[tracks.point[stays]].tolist(),
            (tracks.xy[stays] + 1).tolist(),
            strict=True,
        )
    }
    assert observations(moved) == expected
    assert observations(model) == before
    assert moved.num_points == len(np.unique(tracks.point[stays]))
    assert len(moved.cam_from_world) == 4
    # Rejected keypoints stay in the image, where they were.
    gone = ~kept
    for image, xy in moved.keypoints().items():
        mine = gone & (tracks.image == image)
        np.testing.assert_array_equal(xy[tracks.keypoint[mine]], tracks.xy[mine])


def test_moving_nothing_changes_nothing(model: ColmapModel) -> None:
    tracks = model.tracks()
    assert_same(model, model.moved(tracks, tracks.xy, np.ones(len(tracks.xy), bool)))


CAMERAS = {
    "SIMPLE_PINHOLE": [600.0, 322.0, 239.0],
    "PINHOLE": [600.0, 610.0, 322.0, 239.0],
    "SIMPLE_RADIAL": [600.0, 322.0, 239.0, -0.12],
    "RADIAL": [600.0, 322.0, 239.0, -0.12, 0.02],
    "OPENCV": [600.0, 605.0, 322.0, 239.0, -0.12, 0.02, 0.001, -0.002],
}


@pytest.mark.parametrize("camera_model", CAMERAS)
def test_viewing_rays_lead_to_what_is_projected(model: ColmapModel, camera_model: str) -> None:
    for camera in model.reconstruction.cameras.values():
        camera.model = getattr(pycolmap.CameraModelId, camera_model)
        camera.params = CAMERAS[camera_model]
    rng = np.random.default_rng(0)
    xy = rng.uniform([0, 0], [WIDTH_PX, HEIGHT_PX], (100, 2))
    for image, pose in enumerate(model.cam_from_world.values()):
        centre, rays = model.viewing_rays(image, xy)
        np.testing.assert_allclose(centre, camera_centre(pose), atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(rays, axis=1), 1, atol=1e-12)
        points = centre + rng.uniform(0.5, 20, (100, 1)) * rays
        np.testing.assert_allclose(model.project(image, points), xy, atol=1e-6)
        assert (transform_points(pose, points)[:, 2] > 0).all()
        assert np.isnan(model.project(image, centre - rays)).all()  # behind


def test_projection_is_that_of_the_camera(model: ColmapModel) -> None:
    """Against the formula of COLMAP's SIMPLE_RADIAL."""
    params = CAMERAS["SIMPLE_RADIAL"]
    for camera in model.reconstruction.cameras.values():
        camera.params = params
    points: Float64 = model.tracks().points
    for image, pose in enumerate(model.cam_from_world.values()):
        local = transform_points(pose, points)
        x = local[:, :2] / local[:, 2:]
        square = (x**2).sum(axis=1, keepdims=True)
        expected = params[0] * x * (1 + params[3] * square) + params[1:3]
        np.testing.assert_allclose(model.project(image, points), expected, atol=1e-9)


def test_projecting_nothing(model: ColmapModel) -> None:
    centre, rays = model.viewing_rays(1, np.zeros((0, 2)))
    assert centre.shape == (3,)
    assert rays.shape == (0, 3)
    assert model.project(1, np.zeros((0, 3))).shape == (0, 2)


def test_poses_and_sizes_are_by_number(model: ColmapModel) -> None:
    poses = model.poses()
    assert sorted(poses) == [0, 1, 2, 3]
    for image, pose in poses.items():
        np.testing.assert_array_equal(pose, model.cam_from_world[f"left/{image:02d}.jpg"])
        assert model.size(image) == (WIDTH_PX, HEIGHT_PX)
    camera = model.reconstruction.camera(model.reconstruction.image(3).camera_id)
    camera.width, camera.height = 100, 50
    assert model.size(2) == (100, 50)


def test_images_that_are_not_registered_have_no_pose(model: ColmapModel) -> None:
    frame = model.reconstruction.image(2).frame_id
    pycolmap.ObservationManager(model.reconstruction).deregister_frame(frame)
    assert sorted(model.poses()) == [0, 2, 3]
    assert model.groups(10) == [[0, 2, 3]]


def seen_in_pairs(model: ColmapModel, pairs: dict[tuple[int, int], int]) -> ColmapModel:
    """A model whose points are each seen by one pair of images, so many by each."""
    tracks = model.tracks()
    kept = np.zeros(len(tracks.point), bool)
    point = 0
    for pair, count in pairs.items():
        kept |= (tracks.point >= point) & (tracks.point < point + count) & np.isin(tracks.image, pair)
        point += count
    assert point <= len(tracks.points)
    return model.moved(tracks, tracks.xy, kept)


@pytest.mark.parametrize(
    ("pairs", "groups"),
    [
        ({(0, 1): 6, (1, 2): 6, (2, 3): 6}, [[0, 1, 2, 3]]),
        ({(0, 1): 6, (1, 2): 5, (2, 3): 6}, [[0, 1], [2, 3]]),
        ({(0, 3): 6, (1, 2): 5, (1, 3): 6}, [[0, 1, 3], [2]]),
        ({(1, 2): 9, (2, 3): 9}, [[1, 2, 3], [0]]),
        ({(0, 1): 5, (0, 2): 5, (0, 3): 5, (1, 2): 5, (1, 3): 5, (2, 3): 5}, [[0], [1], [2], [3]]),
        ({}, [[0], [1], [2], [3]]),
    ],
)
def test_groups_are_chains_of_images_that_share_points(
    model: ColmapModel, pairs: dict[tuple[int, int], int], groups: list[list[int]]
) -> None:
    sparse = seen_in_pairs(model, pairs)
    assert sparse.num_points == sum(pairs.values())
    assert sparse.groups(6) == groups
    assert sparse.groups(20) == [[0], [1], [2], [3]]
    assert sparse.groups(1, min_views=3) == [[0], [1], [2], [3]]
    assert model.groups(1, min_views=3) == [[0, 1, 2, 3]]


def test_a_model_without_images_has_no_groups() -> None:
    assert ColmapModel(pycolmap.Reconstruction()).groups(1) == []


def further(model: ColmapModel, kept: Bool, xy: Float64) -> tuple[ColmapModel, Tracks]:
    """A model without some of its observations, and these as further ones, at other pixels."""
    tracks = model.tracks()
    # Points that keep two observations at least stay, in their order.
    assert (np.bincount(tracks.point[kept], minlength=len(tracks.points)) > 1).all()
    gone = ~kept
    more = Tracks(
        points=tracks.points,
        point=tracks.point[gone],
        image=tracks.image[gone],
        keypoint=np.full(int(gone.sum()), -1),
        xy=xy[gone],
    )
    return model.moved(tracks, tracks.xy, kept), more


def test_extended_points_have_further_observations(model: ColmapModel) -> None:
    tracks = model.tracks()
    rng = np.random.default_rng(2)
    kept = (rng.random(len(tracks.point)) > 0.5) | (tracks.image < 2)
    xy = tracks.xy + rng.normal(size=tracks.xy.shape)
    fewer, more = further(model, kept, xy)
    before = fewer.keypoints()
    extended = fewer.extended(more)
    again = extended.tracks()
    np.testing.assert_array_equal(again.points, tracks.points)
    found = dict(zip(zip(again.point.tolist(), again.image.tolist(), strict=True), again.xy.tolist(), strict=True))
    expected = {
        (point, image): one
        for point, image, one in zip(
            tracks.point.tolist(),
            tracks.image.tolist(),
            np.where(kept[:, None], tracks.xy, xy).tolist(),
            strict=True,
        )
    }
    assert found == expected
    assert len(again.point) == len(tracks.point)
    # Each is a new keypoint behind those that were there, which stay.
    count = np.bincount(more.image, minlength=4)
    assert count[2:].min() > 10
    for image, after in extended.keypoints().items():
        assert len(after) == len(before[image]) + count[image]
        np.testing.assert_array_equal(after[: len(before[image])], before[image])
        mine = (again.image == image) & (again.keypoint >= len(before[image]))
        assert mine.sum() == count[image]
    # The model that it came from is as it was.
    for image, after in fewer.keypoints().items():
        np.testing.assert_array_equal(after, before[image])
    assert len(fewer.tracks().point) == kept.sum()


def test_extended_models_are_read_as_they_were_written(model: ColmapModel, tmp_path: Path) -> None:
    tracks = model.tracks()
    fewer, more = further(model, (tracks.image != 3) | (tracks.point % 2 == 0), tracks.xy)
    extended = fewer.extended(more)
    extended.write(tmp_path / "0")
    read = read_model(tmp_path / "0")
    assert_same(extended, read)
    for name in ("points", "point", "image", "keypoint", "xy"):
        np.testing.assert_array_equal(getattr(read.tracks(), name), getattr(extended.tracks(), name))
    for image, xy in extended.keypoints().items():
        np.testing.assert_array_equal(read.keypoints()[image], xy)


def test_extending_by_nothing_changes_nothing(model: ColmapModel) -> None:
    tracks = model.tracks()
    same, none = further(model, np.ones(len(tracks.point), bool), tracks.xy)
    assert_same(model, same.extended(none))
