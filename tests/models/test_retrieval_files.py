"""The official retrieval files: where they lie, what is read from them, and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.retrieval_files import read_codebook, read_retrieval_model
from mast3r_sfm.models.weights import codebook_path, find_retrieval_model
from tests.checkpoints import RETRIEVAL_ARGS, retrieval_tensors, write_codebook, write_retrieval_model

OFFICIAL = "MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric"


def test_the_names_of_the_official_files(tmp_path: Path) -> None:
    model = tmp_path / f"{OFFICIAL}_retrieval_trainingfree.pth"
    assert codebook_path(model) == tmp_path / f"{OFFICIAL}_retrieval_codebook.pkl"
    assert codebook_path(tmp_path / "mine.pth") == tmp_path / "mine_codebook.pkl"


def test_which_retrieval_model_belongs_to_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / f"{OFFICIAL}_retrieval_trainingfree.pth"
    mine.touch()
    (tmp_path / "other_retrieval_trainingfree.pth").mkdir()
    assert find_retrieval_model(tmp_path / f"{OFFICIAL}.pth") == mine
    assert find_retrieval_model(tmp_path / f"{OFFICIAL}.safetensors") == mine
    # Tokens of another network may be as wide, and mean something else.
    assert find_retrieval_model(tmp_path / "DUSt3R_ViTLarge_BaseDecoder_512_dpt.pth") is None
    assert find_retrieval_model(tmp_path / "other.pth") is None

    hub = tmp_path / OFFICIAL
    hub.mkdir()
    for checkpoint in (hub, hub / "model.safetensors"):
        assert find_retrieval_model(checkpoint) == mine
    monkeypatch.chdir(hub)
    assert find_retrieval_model(Path()) == mine
    inside = hub / mine.name
    inside.touch()
    assert find_retrieval_model(hub) == inside
    assert find_retrieval_model(tmp_path / f"{OFFICIAL}.pth") == mine
    assert find_retrieval_model(tmp_path / "none" / "model.safetensors") is None


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["prewhiten.m", "prewhiten.p"]),
        ({"prewhiten": None, "hdims": "6"}, ["projector.0.bias", "projector.0.weight"]),
        (
            {"hdims": "10_8", "residual": True, "postwhiten": "photos", "nfeat": -0.6},
            [
                "postwhiten.m",
                "postwhiten.p",
                "prewhiten.m",
                "prewhiten.p",
                *(f"projector.{place}.{name}" for place in (0, 1, 3) for name in ("bias", "weight")),
            ],
        ),
    ],
)
def test_models_are_read(settings: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    path = write_retrieval_model(tmp_path / "a.pth", 8, **settings)
    model = read_retrieval_model(path)
    expected = retrieval_tensors(8, {**RETRIEVAL_ARGS, **settings})
    assert sorted(model.arrays) == names
    for name, array in model.arrays.items():
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, expected[name].numpy())
    assert model.features == settings.get("nfeat", 300)
    assert model.words == 64
    assert model.residual is bool(settings.get("residual"))
    assert model.hidden == tuple(int(width) for width in settings.get("hdims", "").split("_") if width)
    assert (model.prewhitened, model.postwhitened) == ("prewhiten.m" in names, "postwhiten.m" in names)


def test_the_residual_is_optional_and_what_was_trained_does_not_matter(tmp_path: Path) -> None:
    path = write_retrieval_model(tmp_path / "a.pth", 8, pretrained="elsewhere", freeze_backbone=False)
    stored = torch.load(path, weights_only=False)
    for name in ("residual", "pretrained", "freeze_backbone"):
        delattr(stored["args"], name)
    torch.save(stored, path)
    assert read_retrieval_model(path).residual is False


@pytest.mark.parametrize(
    ("written", "words"), [(64, 64), ("64", 64), ("64k", 65_536), ("1M", 1_048_576), ("2K", 2048), ("3m", 3 << 20)]
)
def test_number_of_words(written: object, words: int, tmp_path: Path) -> None:
    assert read_retrieval_model(write_retrieval_model(tmp_path / "a.pth", 8, nclusters=written)).words == words


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"lambda": 3, "alpha": 1}, "settings that are not known, and could change its results: alpha, lambda"),
        ({"nclusters": "64g"}, "setting nclusters = '64g' is not supported"),
        ({"nclusters": "64kk"}, "nclusters = '64kk'"),
        ({"nclusters": "9" * 50}, "nclusters = '999"),
        ({"nclusters": 0}, "nclusters = '0'"),
        ({"nclusters": -5}, "nclusters = '-5'"),
        ({"nclusters": 64.0}, "nclusters = '64.0'"),
        ({"nclusters": True}, "nclusters = 'True'"),
        ({"nclusters": 1 << 40}, "nclusters = '1099511627776'"),
        ({"nfeat": 0}, "nfeat = '0'"),
        ({"nfeat": -1.5}, "nfeat = '-1.5'"),
        ({"nfeat": 0.6}, "nfeat = '0.6'"),
        ({"nfeat": float("nan")}, "nfeat = 'nan'"),
        ({"nfeat": None}, "nfeat = 'None'"),
        ({"nfeat": torch.tensor([1, 2])}, "nfeat = "),
        ({"imsize": 224}, "imsize = '224'"),
        ({"imsize": torch.tensor([512, 512])}, "imsize = "),
        ({"residual": "yes"}, "residual = 'yes'"),
        ({"residual": torch.ones(3)}, "residual = "),
        ({"featweights": "softmax"}, "featweights = 'softmax'"),
        ({"featweights": None}, "featweights = 'None'"),
        ({"hdims": "8_x"}, "hdims = '8_x'"),
        ({"hdims": "8__8"}, "hdims = '8__8'"),
        ({"hdims": "0"}, "hdims = '0'"),
        ({"hdims": "_".join(["8"] * 1000)}, "hdims = '8_8_8"),
        ({"hdims": (8,)}, r"hdims = '(8,)'"),
        ({"hdims": "8"}, "ask for tensors that it lacks: projector.0.weight, projector.0.bias"),
        ({"postwhiten": "x"}, "ask for tensors that it lacks: postwhiten.m, postwhiten.p"),
        ({"prewhiten": None}, "tensors that its settings do not ask for: prewhiten.m, prewhiten.p"),
    ],
)
def test_settings_that_are_not_known_are_refused_by_name(settings: dict[str, Any], part: str, tmp_path: Path) -> None:
    tensors = retrieval_tensors(8, RETRIEVAL_ARGS)
    path = write_retrieval_model(tmp_path / "a.pth", 8, tensors, **settings)
    with pytest.raises(WeightsError) as raised:
        read_retrieval_model(path)
    assert part in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["prewhiten", "hdims", "postwhiten", "featweights", "nclusters", "imsize"])
def test_settings_that_are_missing(name: str, tmp_path: Path) -> None:
    path = write_retrieval_model(tmp_path / "a.pth", 8)
    stored = torch.load(path, weights_only=False)
    delattr(stored["args"], name)
    torch.save(stored, path)
    with pytest.raises(WeightsError, match=f"lacks the settings {name}"):
        read_retrieval_model(path)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"backbone.enc_norm.bias": torch.ones(3)}, "do not ask for: backbone.enc_norm.bias"),
        ({f"extra{index}": torch.ones(1) for index in range(6)}, "extra0, extra1, extra2, extra3 and 2 more"),
        ({"prewhiten.m": torch.full((1, 8), torch.nan)}, "prewhiten.m holds NaN"),
        ({"prewhiten.p": torch.full((8, 8), -torch.inf)}, "prewhiten.p holds NaN or infinite"),
        ({"prewhiten.m": torch.ones(1, 8, dtype=torch.int64)}, "prewhiten.m is not a plain array"),
        ({"prewhiten.m": torch.ones(1, 8).to_sparse()}, "prewhiten.m is not a plain array"),
        ({"prewhiten.m": torch.ones(1, 8, device="meta")}, "prewhiten.m is not a plain array"),
        ({"prewhiten.m": "text"}, "prewhiten.m is not a plain array"),
        ({"prewhiten.p": torch.zeros(1).expand(1 << 20, 1 << 20)}, "more numbers than it holds"),
    ],
)
def test_tensors_that_cannot_be(changes: dict[str, Any], part: str, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {**retrieval_tensors(8, RETRIEVAL_ARGS), **changes}
    path = write_retrieval_model(tmp_path / "a.pth", 8, tensors)
    with pytest.raises(WeightsError) as raised:
        read_retrieval_model(path)
    assert part in str(raised.value)
    assert str(path) in str(raised.value)


def test_other_files_are_told_from_retrieval_models(tmp_path: Path) -> None:
    for stored in (
        [1],
        {"args": {}, "model": {}},
        {"args": RETRIEVAL_ARGS},
        {"args": RETRIEVAL_ARGS, "model": [1]},
        {"model": {"prewhiten.m": torch.ones(3)}},
    ):
        torch.save(stored, tmp_path / "a.pth")
        with pytest.raises(WeightsError, match=r"a\.pth: it holds no retrieval model"):
            read_retrieval_model(tmp_path / "a.pth")


class Malice:
    """Unpickled naively, it would make a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_models_that_would_run_code_run_nothing(tmp_path: Path) -> None:
    path = write_retrieval_model(tmp_path / "a.pth", 8, pretrained=Malice(tmp_path / "ran"))
    with pytest.raises(WeightsError, match="nothing of it was run"):
        read_retrieval_model(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_codebooks_are_read(protocol: int, tmp_path: Path) -> None:
    path = write_codebook(tmp_path / "a.pkl", 64, 8, protocol)
    words = read_codebook(path, 64)
    assert words.dtype == np.float32
    np.testing.assert_array_equal(words, pickle.loads(path.read_bytes())["state"]["centroids"])


def test_codebooks_that_cannot_be(tmp_path: Path) -> None:
    good = {"type": "Codebook", "params": {"size": 3}, "state": {"centroids": np.ones((3, 2), np.float32)}}
    path = tmp_path / "a.pkl"
    broken = np.ones((3, 2), np.float32)
    broken[1, 1] = np.nan
    endless = np.ones((3, 2), np.float32)
    endless[2, 0] = -np.inf
    for stored, part in (
        (None, "holds no codebook"),
        ({}, "holds no codebook"),
        ({**good, "type": "Index"}, "holds no codebook"),
        ({**good, "params": {}}, "holds no codebook"),
        ({**good, "params": {"size": 3, "metric": "ip"}}, "settings that are not known: metric"),
        ({**good, "state": {"centroids": 3}}, "holds no codebook"),
        ({**good, "params": {"size": 4}}, "no table of the size that it states"),
        ({**good, "params": {"size": "3"}}, "no table of the size that it states"),
        ({**good, "state": {"centroids": np.ones(3, np.float32)}}, "no table of the size"),
        ({**good, "state": {"centroids": broken}}, "holds NaN or infinite values"),
        ({**good, "state": {"centroids": endless}}, "holds NaN or infinite values"),
        ({**good, "state": {"centroids": Malice(tmp_path / "ran")}}, "nothing of it was run"),
    ):
        path.write_bytes(pickle.dumps(stored))
        with pytest.raises(WeightsError) as raised:
            read_codebook(path, 3)
        assert part in str(raised.value)
        assert str(path) in str(raised.value)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(pickle.dumps(good))
    with pytest.raises(WeightsError, match=r"has 3 words, but the model beside it asks for 65,536"):
        read_codebook(path, 65_536)
