"""`reconstruct --model PATH` with a tiny, random MASt3R: how it ends, and what is said of options that cannot be."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mast3r_sfm.matching import check, putative
from tests.checkpoints import DUST3R, random_tensors, write_codebook, write_hub_folder, write_retrieval_model

Command = Callable[..., Any]
SMALL = ("--set", "encode.max_size_px=64", "--device", "cpu", "--threads", 1)


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None are installed; and no long search for a geometry that is not there."""
    monkeypatch.setenv("MAST3R_SFM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(check, "MAX_ITERATIONS", 200)
    monkeypatch.setattr(putative, "MAX_SEEDS", 300)


@pytest.fixture(scope="module")
def photos(scene_photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the example, small."""
    folder = tmp_path_factory.mktemp("photos")
    for path in scene_photos[:3]:
        with Image.open(path) as photo:
            photo.thumbnail((160, 160))
            photo.save(folder / path.name)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hub_folder(tmp_path_factory.mktemp("model"), DUST3R, random_tensors(DUST3R))


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its attention is NaN."""
    tensors = random_tensors(DUST3R)
    name = "enc_blocks.0.attn.qkv.weight"
    return write_hub_folder(tmp_path_factory.mktemp("broken"), DUST3R, tensors | {name: tensors[name] * torch.nan})


def test_a_random_network_ends_in_words(
    golden_dir: Path, photos: Path, tmp_path: Path, run_command: Command, run_here: Command
) -> None:
    arguments = ("reconstruct", photos, "-o", tmp_path / "out", "--model", golden_dir / "tiny_mast3r.safetensors")
    result = run_command(*arguments, *SMALL)
    assert result.code == 1
    assert result.out == ""
    assert "error: no two photos were found to show the same place; take photos with more overlap" in result.err
    report = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert report["model"] == "mast3r"
    assert report["models"] == []
    assert not (tmp_path / "out" / "sparse" / "0").exists()
    again = run_here(*arguments, *SMALL)
    assert (again.code, again.out) == (1, "")
    report = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert [stage["resumed"] for stage in report["stages"]] == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str, model: Path, photos: Path, tmp_path: Path, run_here: Command) -> None:
    result = run_here("reconstruct", photos, "-o", tmp_path / "out", "--model", model, "--dtype", dtype, *SMALL)
    assert result.code == 1
    assert "no two photos" in result.err
    report = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert report["config"]["match"]["dtype"] == dtype
    assert report["model"] == "dust3r"


def test_resolution(model: Path, photos: Path, tmp_path: Path, run_here: Command) -> None:
    fine = ("-o", tmp_path / "out", "--resolution", "fine")
    result = run_here("reconstruct", photos, *fine, "--model", model, *SMALL)
    assert result.code == 1
    report = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert report["config"]["match"]["resolution"] == "fine"
    result = run_here("reconstruct", photos, *fine, "--model", "xfeat")
    assert result.code == 2
    assert "match.resolution = 'fine': xfeat finds keypoints and matches no windows" in result.err
    assert "set encode.max_size_px" in result.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--dtype", "float8"], "must be one of auto, float32, float16, bfloat16"),
        (["--dtype", "half"], "match.dtype = 'half'"),
        (["--resolution", "full"], "must be one of auto, coarse, fine"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["--device", "abacus"], "--device abacus: write auto, cpu, cuda, cuda:1 or mps"),
        (["--set", "encode.max_size_px=40"], "must be 0 (auto) or at least 64"),
    ],
)
def test_options_that_cannot_be(
    arguments: list[str], part: str, model: Path, photos: Path, tmp_path: Path, run_here: Command
) -> None:
    result = run_here("reconstruct", photos, "-o", tmp_path / "out", "--model", model, *arguments)
    assert result.code == 2
    assert result.out == ""
    assert part in result.err
    assert not list(tmp_path.glob("out/cache/*"))


def test_models_that_cannot_be_loaded(
    model: Path, broken_model: Path, photos: Path, tmp_path: Path, run_here: Command
) -> None:
    lone = shutil.copy(model / "model.safetensors", tmp_path / "lone.safetensors")
    cut = shutil.copytree(model, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**config, "enc_depth": 3}), encoding="utf-8")
    (tmp_path / "text.pth").write_text("weights")
    for path, part in (
        (tmp_path / "missing.pth", "there is no file or folder of weights at"),
        (tmp_path / "text.pth", "text.pth"),
        (lone, "does not say how its network is built"),
        (cut, "cut"),
        (other, "12 tensors are missing: enc_blocks.2."),
        (broken_model, "dust3r gives NaN or infinite values: the weights are broken"),
        ("mast3r", "the weights mast3r are not installed: mast3r-sfm weights download mast3r gets them"),
        ("master", "there is no model 'master'; known: auto, xfeat, mast3r, dust3r"),
    ):
        result = run_here("reconstruct", photos, "-o", tmp_path / "out", "--model", path, *SMALL)
        assert result.code == 2, path
        assert result.out == ""
        assert part in result.err
        if isinstance(path, Path) and path != broken_model:
            assert str(path) in result.err


class Malice:
    """Unpickled naively, it would make a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_official_retrieval_files(model: Path, photos: Path, tmp_path: Path, run_here: Command) -> None:
    (tmp_path / "weights").mkdir()
    mine = shutil.copytree(model, tmp_path / "weights" / "mine")
    retrieval = tmp_path / "weights" / "mine_retrieval_trainingfree.pth"
    codebook = tmp_path / "weights" / "mine_retrieval_codebook.pkl"
    width: int = DUST3R["enc_embed_dim"]
    write_retrieval_model(retrieval, width, nclusters="1k")
    write_codebook(codebook, 1024, width)
    arguments = ("reconstruct", photos, "-o", tmp_path / "out", "--model", mine, *SMALL)
    result = run_here(*arguments)
    assert result.code == 1
    report = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert f"photos are compared by {retrieval.name}, in 1,024 visual words" in report["notes"]

    stored = {"type": "Codebook", "params": {"size": 1024}, "state": {"centroids": Malice(tmp_path / "ran")}}
    codebook.write_bytes(pickle.dumps(stored))
    result = run_here(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert f"error: {codebook} is refused, and nothing of it was run: it names code" in result.err
    assert "set pairs.retrieval=collection" in result.err
    assert not (tmp_path / "ran").exists()
    result = run_here(*arguments, "--set", "pairs.retrieval=collection")
    assert result.code == 1
    result = run_here(*arguments, "--set", "pairs.retrieval=none.pth")
    assert result.code == 2
    assert "error: pairs.retrieval = 'none.pth': there is no such file" in result.err


def test_compiling_without_a_compiler(model: Path, photos: Path, tmp_path: Path, run_command: Command) -> None:
    environment = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    arguments = ("reconstruct", photos, "-o", tmp_path / "out", "--model", model, "--compile", *SMALL)
    result = run_command(*arguments, **environment)
    assert result.code == 2
    assert result.out == ""
    assert "error: --compile: torch cannot compile the network on this machine" in result.err
    assert "install a C++ compiler, or leave --compile out" in result.err
