"""Runs of a tiny MASt3R with tiny official retrieval files: which are taken, what is said, and what is done again."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mast3r_sfm import pipeline
from mast3r_sfm.config import Config, RunOptions
from mast3r_sfm.errors import ConfigError, Mast3rSfmError, ReconstructionError, WeightsError
from mast3r_sfm.matching import check, putative
from mast3r_sfm.models.mast3r.model import Mast3rModel
from tests.checkpoints import DUST3R, random_tensors, write_codebook, write_hub_folder, write_retrieval_model
from tests.exact import Listener

WIDTH: int = DUST3R["enc_embed_dim"]
NAME = "tiny"
MODEL, CODEBOOK = f"{NAME}_retrieval_trainingfree.pth", f"{NAME}_retrieval_codebook.pkl"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long search for a geometry that is not there."""
    monkeypatch.setattr(check, "MAX_ITERATIONS", 100)
    monkeypatch.setattr(putative, "MAX_SEEDS", 100)


@pytest.fixture(scope="module")
def photos(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the example, small."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted((repository / "examples" / "house" / "images").iterdir())[:3]:
        with Image.open(path) as photo:
            photo.thumbnail((96, 96))
            photo.save(folder / path.name)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A hub folder, in a folder of its own."""
    return write_hub_folder(tmp_path / "weights" / NAME, DUST3R, random_tensors(DUST3R))


def write_files(checkpoint: Path, width: int = WIDTH) -> Path:
    write_codebook(checkpoint.parent / CODEBOOK, 32, 6)
    settings = {"hdims": "10_6", "postwhiten": "photos", "nfeat": -0.5, "nclusters": 32}
    return write_retrieval_model(checkpoint.parent / MODEL, width, **settings)


class Run:
    """A run up to where random networks lead, or to the error that came before."""

    def __init__(self, photos: Path, output: Path, checkpoint: Path | str, *settings: str) -> None:
        self.listener = Listener()
        config = Config().with_overrides([f"encode.model={checkpoint}", "encode.max_size_px=64", *settings])
        options = RunOptions(device="cpu", threads=1)
        with pytest.raises(Mast3rSfmError) as raised:
            pipeline.reconstruct(photos, output, config, options, self.listener)
        self.error = raised.value
        self.report: dict[str, Any] = json.loads((output / "run.json").read_text(encoding="utf-8"))
        self.stages = {stage["stage"]: stage for stage in self.report["stages"]}

    @property
    def about_retrieval(self) -> list[str]:
        return [note for note in self.report["notes"] if note.startswith("photos are compared by")]


def test_files_beside_the_checkpoint_are_used(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    learnt = Run(photos, output, checkpoint)
    assert isinstance(learnt.error, ReconstructionError)
    assert "tokens in" in learnt.about_retrieval[0]
    write_files(checkpoint)
    official = Run(photos, output, checkpoint)
    assert isinstance(official.error, ReconstructionError)
    assert official.about_retrieval == [f"photos are compared by {MODEL}, in 32 visual words"]
    assert official.listener.warnings == []
    assert official.stages["encode"]["resumed"] == 1
    assert official.stages["pairs"]["resumed"] == 0
    assert official.stages["pairs"]["key"] != learnt.stages["pairs"]["key"]
    # And back, without being computed again.
    again = Run(photos, output, checkpoint, "pairs.retrieval=collection")
    assert again.stages["pairs"]["key"] == learnt.stages["pairs"]["key"]
    assert again.stages["pairs"]["resumed"] == 1
    assert again.listener.steps == sum(total for _, total, _ in again.listener.started)


def test_it_is_the_contents_that_count_and_not_the_path(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    path = write_files(checkpoint)
    output = tmp_path / "out"
    first = Run(photos, output, checkpoint)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(path, tmp_path / "elsewhere" / "mine_a.pth")
    shutil.move(path.with_name(CODEBOOK), tmp_path / "elsewhere" / "mine_codebook.pkl")
    second = Run(photos, output, checkpoint, f"pairs.retrieval={moved}")
    assert second.about_retrieval == ["photos are compared by mine_a.pth, in 32 visual words"]
    assert second.stages["pairs"]["key"] == first.stages["pairs"]["key"]
    assert second.stages["pairs"]["resumed"] == 1
    write_codebook(tmp_path / "elsewhere" / "mine_codebook.pkl", 32, 6, protocol=2)
    third = Run(photos, output, checkpoint, f"pairs.retrieval={moved}")
    assert third.stages["pairs"]["key"] != first.stages["pairs"]["key"]
    assert third.stages["pairs"]["resumed"] == 0


class Malice:
    """Unpickled naively, it would make a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_hostile_codebook_ends_the_run_before_photos_are_encoded(
    photos: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_files(checkpoint)
    stored = {"type": "Codebook", "params": {"size": 32}, "state": {"centroids": Malice(tmp_path / "ran")}}
    path.with_name(CODEBOOK).write_bytes(pickle.dumps(stored))

    def encode(*_: object) -> None:
        raise AssertionError("photos are encoded")

    monkeypatch.setattr(Mast3rModel, "encode", encode)
    found = Run(photos, tmp_path / "out", checkpoint)
    assert isinstance(found.error, WeightsError)
    assert found.error.exit_code == 2
    assert f"{CODEBOOK} is refused, and nothing of it was run" in str(found.error)
    assert found.report["error"] == str(found.error)
    assert not (tmp_path / "ran").exists()


def test_files_that_do_not_fit(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    path = write_files(checkpoint, width=WIDTH + 4)
    found = Run(photos, tmp_path / "out", checkpoint)
    assert isinstance(found.error, ReconstructionError)
    assert f"{path} takes tokens of 20 channels, and the model's have 16: it is not used" in found.report["notes"]
    assert "tokens in" in found.about_retrieval[0]
    asked = Run(photos, tmp_path / "asked", checkpoint, f"pairs.retrieval={path}")
    assert isinstance(asked.error, WeightsError)
    assert "takes tokens of 20 channels, and the model's have 16" in str(asked.error)
    other = Run(photos, tmp_path / "xfeat", "xfeat", f"pairs.retrieval={path}")
    assert isinstance(other.error, ConfigError)
    assert "the model in use has no such files" in str(other.error)
