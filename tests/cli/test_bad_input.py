"""Folders as they are found in the world: never a traceback, never a lost result, and every file left out is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

Texture = Callable[..., Image.Image]
Command = Callable[..., Any]


def reasons(report: Any) -> dict[str, str]:
    return {entry["name"]: entry["reason"] for entry in report["left_out"]}


def sixteen_bit(photo: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)


def lying(photo: Image.Image) -> Image.Image:
    """The photo as a camera held upright would store it, with EXIF that says so."""
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[ExifTags.Base.Orientation] = 6
    return turned


USUAL: dict[str, Callable[[Image.Image], Image.Image]] = {
    "Straße nach Süden 1.jpg": lambda photo: photo,
    "16 bit.png": sixteen_bit,
    "grey.jpg": lambda photo: photo.convert("L"),
    "rgba.png": lambda photo: photo.convert("RGBA"),
    "cmyk.jpg": lambda photo: photo.convert("CMYK"),
    "palette.png": lambda photo: photo.quantize(256),
    "写真/upright.JPG": lying,
}
"""One of each kind of file that is unusual, and still a photo."""


@pytest.fixture(scope="module")
def mixed_folder(scene_photos: list[Path], texture: Texture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos of one scene, each stored in another way, among files that are no photos of it."""
    folder = tmp_path_factory.mktemp("mixed")
    for (name, convert), source in zip(USUAL.items(), scene_photos, strict=True):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        with Image.open(source) as photo:
            stored = convert(photo.convert("RGB"))
        stored.save(target, **({"quality": 95, "exif": stored.getexif()} if target.suffix.lower() == ".jpg" else {}))
    jpeg = scene_photos[0].read_bytes()
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "text.jpg").write_text("This is no photo.\n")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("Not a photo, and not named like one.\n")
    shutil.copy(folder / "grey.jpg", folder / "zz copy of grey.jpg")
    texture(30, 30).save(folder / "icon.png")
    Image.new("RGB", (640, 480)).save(folder / "black.jpg")
    texture(20_000, 2_500, seed=5).save(folder / "panorama.jpg")
    return folder


@pytest.fixture(scope="module")
def mixed_run(mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_command: Command) -> Any:
    output = tmp_path_factory.mktemp("mixed") / "out"
    return run_command("reconstruct", mixed_folder, "-o", output, "--threads", 2, "--json")


def test_every_kind_of_photo_is_reconstructed(mixed_run: Any) -> None:
    assert mixed_run.code == 0, mixed_run.err
    assert set(mixed_run.json["models"][0]["images"]) == set(USUAL)
    assert len(mixed_run.json["models"]) == 1


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("truncated.jpg", "truncated"),
        ("text.jpg", "not a photo"),
        ("empty.png", "empty"),
        ("icon.png", "too small"),
        ("black.jpg", "no content"),
        ("zz copy of grey.jpg", "same file as grey.jpg"),
        ("panorama.jpg", "no other photo"),
    ],
)
def test_every_file_left_out_is_named_with_its_reason(mixed_run: Any, name: str, part: str) -> None:
    found = reasons(mixed_run.json)
    assert part in found[name]
    assert len(found) == 7
    assert name in mixed_run.err


def test_only_the_report_is_on_stdout_and_only_warnings_on_stderr(mixed_run: Any) -> None:
    assert mixed_run.out.count("\n") == 1
    assert mixed_run.json["num_images"] == len(USUAL) + 7
    assert all(line.startswith("warning: ") for line in mixed_run.err.splitlines())
    assert "notes.txt" not in mixed_run.out + mixed_run.err


class TestNothingToDo:
    """Photos that cannot give a model: a message, code 2 for the files and code 1 for what they show."""

    def failed(self, run: Command, images: Path, output: Path, code: int) -> str:
        result = run("reconstruct", images, "-o", output, "--threads", 2, "--json")
        assert result.code == code, result.err
        assert result.err.splitlines()[-1 if code == 1 else 0].startswith("error: ")
        assert set(result.json) == {"error", "kind"}
        assert result.json["error"] in result.err
        return str(result.json["error"])

    def test_no_folder(self, tmp_path: Path, run_here: Command) -> None:
        assert "does not exist" in self.failed(run_here, tmp_path / "missing", tmp_path / "out", 2)
        assert not (tmp_path / "out").exists()

    def test_an_empty_folder(self, tmp_path: Path, run_command: Command) -> None:
        (tmp_path / "images").mkdir()
        assert "is empty" in self.failed(run_command, tmp_path / "images", tmp_path / "out", 2)
        assert not (tmp_path / "out").exists()

    def test_one_photo_and_some_that_are_none(self, tmp_path: Path, texture: Texture, run_here: Command) -> None:
        images = tmp_path / "images"
        images.mkdir()
        texture(320, 240).save(images / "single.jpg")
        Image.new("L", (320, 240), 3).save(images / "dark.jpg")
        (images / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
        message = self.failed(run_here, images, tmp_path / "out", 2)
        assert "only single.jpg" in message
        assert "dark.jpg: no content" in message
        assert "broken.jpg" in message

    def test_photos_of_different_places(self, tmp_path: Path, texture: Texture, run_here: Command) -> None:
        images = tmp_path / "images"
        images.mkdir()
        for seed in range(3):
            texture(640, 480, seed).save(images / f"{seed}.jpg")
        assert "no two photos" in self.failed(run_here, images, tmp_path / "out", 1)
        report = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
        assert "no two photos" in report["error"]
        assert report["models"] == []
        assert not (tmp_path / "out" / "sparse").exists()

    def test_pure_rotation(self, scene_photos: list[Path], tmp_path: Path, run_here: Command) -> None:
        write_rotation(scene_photos, tmp_path / "images")
        assert "pure rotation" in self.failed(run_here, tmp_path / "images", tmp_path / "out", 1)


def write_rotation(photos: list[Path], folder: Path, number: int = 4) -> None:
    """Photos from one point: a wall of four pictures, seen by a camera that turns and does not move."""
    folder.mkdir()
    width, height = 640, 480
    wall = Image.new("RGB", (2 * width, 2 * height))
    for index, path in enumerate(photos[:4]):
        with Image.open(path) as photo:
            wall.paste(photo.convert("RGB").resize((width, height)), (index % 2 * width, index // 2 * height))
    wall_camera = np.array([[900.0, 0.0, width], [0.0, 900.0, height], [0.0, 0.0, 1.0]])
    camera = np.array([[700.0, 0.0, width / 2], [0.0, 700.0, height / 2], [0.0, 0.0, 1.0]])
    for index, angle in enumerate(np.radians(np.linspace(-9, 9, number))):
        tilt = 0.4 * angle * (-1) ** index
        cosine, sine = np.cos(angle), np.sin(angle)
        pan = np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
        nod = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
        homography = wall_camera @ pan @ nod @ np.linalg.inv(camera)  # wall_from_photo
        coefficients = (homography / homography[2, 2]).ravel()[:8]
        photo = wall.transform(
            (width, height), Image.Transform.PERSPECTIVE, tuple(coefficients), Image.Resampling.BICUBIC
        )
        photo.save(folder / f"turn {index}.jpg", quality=95)


def test_two_places_give_two_models_and_nobody_is_in_the_wrong_one(
    scene_photos: list[Path], tmp_path: Path, run_command: Command
) -> None:
    images = tmp_path / "images"
    for place in ("here", "there"):
        (images / place).mkdir(parents=True)
    for path in scene_photos[:4]:
        shutil.copy(path, images / "here")
        with Image.open(path) as photo:
            # A place of its own that is just as good: the world behind a mirror, as a negative.
            ImageOps.invert(ImageOps.mirror(photo.convert("RGB"))).save(images / "there" / path.name, quality=95)
    result = run_command("reconstruct", images, "-o", tmp_path / "out", "--threads", 2, "--json")
    assert result.code == 0, result.err
    models = [{name.split("/")[0] for name in model["images"]} for model in result.json["models"]]
    assert sorted(map(sorted, models)) == [["here"], ["there"]]
    assert (tmp_path / "out" / "sparse" / "1").is_dir()
    assert len(result.json["models"][0]["images"]) >= len(result.json["models"][1]["images"]) >= 3
