"""Running commands as a user does, in a process of their own, on small folders of photos."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mast3r_sfm_cli.main import run

PHOTOS = 7
"""Photos of the example that the tests reconstruct: enough for a good model, few enough to be quick."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mast3r_sfm_cli.main", *map(str, arguments)]


@pytest.fixture(scope="session")
def run_command() -> Callable[..., Result]:
    """run_command("doctor", "--json"): runs the command to its end. A traceback is never all right."""

    def call(*arguments: object, **environment: str) -> Result:
        process = subprocess.run(
            command(*arguments), env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert "Traceback" not in process.stderr, process.stderr
        return Result(code=process.returncode, out=process.stdout, err=process.stderr)

    return call


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """As `run_command`, inside this process: quicker, as the libraries are loaded already."""

    def call(*arguments: object) -> Result:
        code = run(list(map(str, arguments)))
        out, err = capsys.readouterr()
        return Result(code=code, out=out, err=err)

    return call


@pytest.fixture(scope="session")
def start_command() -> Callable[..., subprocess.Popen[str]]:
    """Starts the command and does not wait for it."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)

    return start


@pytest.fixture(scope="session")
def example(repository: Path) -> Path:
    """The example of the project: a folder with images/ and gt.json."""
    (images,) = (repository / "examples").glob("*/images")
    return images.parent


@pytest.fixture(scope="session")
def scene_photos(example: Path) -> list[Path]:
    """Neighbouring photos of the example."""
    return sorted((example / "images").iterdir())[:PHOTOS]


@pytest.fixture(scope="session")
def photo_folder(scene_photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scene's photos and nothing else."""
    folder = tmp_path_factory.mktemp("photos")
    for path in scene_photos:
        shutil.copy(path, folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished reconstruction of `photo_folder`."""

    output: Path
    result: Result


@pytest.fixture(scope="session")
def finished_run(
    photo_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_command: Callable[..., Result]
) -> Run:
    """One reconstruction, of which several tests look at different sides. It must not be changed."""
    output = tmp_path_factory.mktemp("finished") / "out"
    result = run_command("reconstruct", photo_folder, "-o", output, "--threads", 2)
    assert result.code == 0, result.err
    return Run(output=output, result=result)


def make_texture(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="session")
def texture() -> Callable[..., Image.Image]:
    """texture(width, height, seed=0): a picture full of detail that shows no place."""

    def make(width: int, height: int, seed: int = 0) -> Image.Image:
        return Image.fromarray(make_texture(width, height, seed))

    return make


@pytest.fixture
def two_photos(tmp_path: Path, texture: Callable[..., Image.Image]) -> Path:
    """A folder with two photos that pass for photos, for tests that do not get to look at them."""
    folder = tmp_path / "two"
    folder.mkdir()
    for seed in (1, 2):
        texture(160, 120, seed).save(folder / f"{seed}.png")
    return folder
