"""Small runs of the whole chain on the example's photos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mast3r_sfm.colmap.model import ColmapModel, read_model
from mast3r_sfm.config import Config, RunOptions
from mast3r_sfm.pipeline import reconstruct
from mast3r_sfm.summaries import RunReport
from tests.exact import Listener

PHOTOS = 6
SMALL = ("encode.model=xfeat", "encode.max_size_px=448", "encode.keypoints=1500")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    photos: Path
    output: Path
    report: RunReport
    listener: Listener

    @property
    def json(self) -> Any:
        """run.json."""
        return json.loads((self.output / "run.json").read_text(encoding="utf-8"))

    @property
    def keys(self) -> dict[str, str]:
        """The key of each stage."""
        return {stage.stage: stage.key for stage in self.report.stages}

    @property
    def resumed(self) -> dict[str, int]:
        """Finished chunks found, of the stages that store any."""
        return {
            stage.stage: stage.resumed for stage in self.report.stages if stage.stage in ("encode", "pairs", "match")
        }

    @property
    def model(self) -> ColmapModel:
        """The first model, read from disk."""
        return read_model(self.output / "sparse" / "0")


Reconstruct = Callable[..., Run]


@pytest.fixture(scope="session")
def run_small() -> Reconstruct:
    """run_small(photos, output, "match.min_inliers=30", threads=1): reconstruct quickly."""

    def call(photos: Path, output: Path, *settings: str, threads: int = 2, resume: bool = True) -> Run:
        listener = Listener()
        config = Config().with_overrides([*SMALL, *settings])
        options = RunOptions(device="cpu", threads=threads, resume=resume)
        report = reconstruct(photos, output, config, options, listener)
        return Run(photos=photos, output=output, report=report, listener=listener)

    return call


@pytest.fixture(scope="session")
def house(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second photo of the example."""
    folder = tmp_path_factory.mktemp("house")
    photos = sorted((repository / "examples" / "house" / "images").iterdir())[: 2 * PHOTOS : 2]
    for photo in photos:
        shutil.copy(photo, folder / photo.name)
    return folder


@pytest.fixture(scope="session")
def first_run(run_small: Reconstruct, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The photos reconstructed once; for looking at, not for running again."""
    return run_small(house, tmp_path_factory.mktemp("out") / "new" / "folder")


@pytest.fixture
def second_output(first_run: Run, tmp_path: Path) -> Path:
    """A copy of the first run's output, to run again."""
    return shutil.copytree(first_run.output, tmp_path / "out")
