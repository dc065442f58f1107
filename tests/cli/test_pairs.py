"""`pairs`, and the options about pairs of `reconstruct`, on rendered photos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mast3r_sfm.synthetic.photos import write_photos
from mast3r_sfm.synthetic.render import make_views

Command = Callable[..., Any]
SETTINGS = ("--model", "xfeat", "--device", "cpu", "--threads", 2, "--set", "encode.keypoints=1500")
PHOTOS = 5


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five views of a house, and their truth."""
    folder = tmp_path_factory.mktemp("pairs")
    write_photos(folder, make_views("facade", PHOTOS, width_px=320, height_px=240, samples=1))
    return folder


def names_of(photos: Path) -> list[str]:
    return sorted(path.name for path in (photos / "images").iterdir())


def listed(output: Path) -> list[tuple[str, ...]]:
    return [tuple(line.split(" ")) for line in (output / "pairs.txt").read_text(encoding="utf-8").splitlines()]


def test_pairs_are_listed_and_drawn(photos: Path, tmp_path: Path, run_here: Command) -> None:
    output = tmp_path / "out"
    result = run_here("pairs", photos / "images", "-o", output, *SETTINGS)
    assert result.code == 0, result.err
    assert result.out.startswith("10 of 10 pairs of 5 photos")
    names = names_of(photos)
    assert listed(output) == [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    with Image.open(output / "pairs.png") as picture:
        picture.load()
        assert min(picture.size) > 500
    assert sorted(path.name for path in output.iterdir()) == ["cache", "pairs.png", "pairs.txt"]


def test_reconstruct_goes_on_from_there(photos: Path, tmp_path: Path, run_here: Command) -> None:
    output = tmp_path / "out"
    arguments = (photos / "images", "-o", output, *SETTINGS, "--pairs", "sequential", "--window", 2)
    assert run_here("pairs", *arguments).code == 0
    result = run_here("reconstruct", *arguments, "--json")
    assert result.code == 0, result.err
    stages = {stage["stage"]: stage for stage in result.json["stages"]}
    assert stages["encode"]["resumed"] == stages["pairs"]["resumed"] == 1
    assert stages["pairs"]["counts"]["sequence"] == stages["pairs"]["counts"]["pairs"] == 8  # steps of 1, 2 and 4
    # All photos see one another, so the second round adds the pairs that were left out.
    assert stages["match"]["counts"]["pairs"] == 10
    assert len(result.json["models"][0]["images"]) == PHOTOS
    again = run_here("pairs", *arguments, "--json").json
    assert (again["pairs"], again["kinds"]["sequence"], again["num_images"]) == (8, 8, PHOTOS)
    assert [stage["resumed"] for stage in again["stages"]] == [0, 1, 1]


def test_only_the_pairs_of_a_list_are_matched(photos: Path, tmp_path: Path, run_here: Command) -> None:
    names = names_of(photos)
    chosen = [(names[0], names[1]), (names[1], names[2]), (names[0], names[2])]
    path = tmp_path / "my pairs.txt"
    path.write_text("".join(f"{b} {a}\n" for a, b in chosen), encoding="utf-8")
    output = tmp_path / "out"
    arguments = ("reconstruct", photos / "images", "-o", output, *SETTINGS, "--pairs-file", path, "--json")
    result = run_here(*arguments)
    assert result.code == 0, result.err
    stages = {stage["stage"]: stage for stage in result.json["stages"]}
    assert stages["match"]["counts"]["pairs"] == 3
    assert stages["pairs"]["counts"]["user"] == 3
    assert result.json["models"][0]["images"] == names[:3]
    assert [entry["name"] for entry in result.json["left_out"]] == names[3:]

    # Moved, it is the same list; changed, it is another.
    keys = {name: stage["key"] for name, stage in stages.items()}
    moved = shutil.move(path, tmp_path / "moved.txt")
    same = run_here("pairs", photos / "images", "-o", output, *SETTINGS, "--pairs-file", moved, "--json").json
    assert same["stages"][2]["key"] == keys["pairs"]
    assert same["stages"][2]["resumed"] == 1
    with Path(moved).open("a", encoding="utf-8") as stream:
        stream.write(f"{names[3]} {names[4]}\n")
    other = run_here("pairs", photos / "images", "-o", output, *SETTINGS, "--pairs-file", moved, "--json").json
    assert other["stages"][2]["key"] != keys["pairs"]
    assert listed(output)[-1] == (names[3], names[4])


def test_a_time_budget(photos: Path, tmp_path: Path, run_here: Command) -> None:
    arguments = ("reconstruct", photos / "images", "-o", tmp_path / "out", *SETTINGS, "--json")
    short = run_here(*arguments, "--time-budget", 1e-9)
    assert short.code == 1
    assert "the time budget of 1e-09 minutes was spent: 10 of 10 pairs were not matched" in short.err
    assert (
        "no pair of photos was matched; raise the time budget"
        in json.loads((tmp_path / "out" / "run.json").read_text())["error"]
    )
    longer = run_here(*arguments, "--time-budget", 10)
    assert longer.code == 0, longer.err
    stages = {stage["stage"]: stage for stage in longer.json["stages"]}
    assert stages["match"]["counts"]["pairs"] == 10
    assert stages["match"]["warnings"] == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--pairs", "nearest"], "pairs.source = 'nearest': must be auto, or of retrieval"),
        (["--pairs", "file"], "needs pairs.file"),
        (["--pairs", "gps"], "0 of 5 photos have a GPS position"),
        (["--pairs-file", "no/such.txt"], "cannot read the list of pairs no/such.txt"),
        (["--neighbours", "0"], "pairs.neighbours = 0"),
        (["--window", "-1"], "pairs.window = -1"),
    ],
)
@pytest.mark.parametrize("command", ["pairs", "reconstruct"])
def test_wrong_use(
    command: str, arguments: list[str], part: str, photos: Path, tmp_path: Path, run_here: Command
) -> None:
    result = run_here(command, photos / "images", "-o", tmp_path / "out", *SETTINGS, *arguments)
    assert result.code == 2
    assert part in result.err


def test_pairs_respects_the_output_folder(photos: Path, tmp_path: Path, run_here: Command) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = run_here("pairs", photos / "images", "-o", tmp_path, *SETTINGS)
    assert result.code == 2
    assert "holds files that are not from an earlier run" in result.err
    assert run_here("pairs", "-o", tmp_path / "out").code == 2
    quiet = run_here("pairs", "--image-path", photos / "images", "-o", tmp_path / "out", "--quiet", *SETTINGS)
    assert (quiet.code, quiet.out) == (0, "")


def test_a_killed_run_of_pairs_is_taken_up(
    photos: Path, tmp_path: Path, run_command: Command, start_command: Command
) -> None:
    output = tmp_path / "out"
    arguments = ("pairs", photos / "images", "-o", output, *SETTINGS, "--json")
    process = start_command(*arguments)
    while process.poll() is None and not list(output.glob("cache/encode/*/*.safetensors")):
        pass
    process.kill()
    process.wait()
    assert process.returncode == -9, "the run ended before it could be killed"
    result = run_command(*arguments)
    assert result.code == 0, result.err
    assert result.json["stages"][1]["resumed"] == 1
    assert len(listed(output)) == 10
