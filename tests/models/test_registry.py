"""Models and devices by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mast3r_sfm.config import DecoderType, EncodeConfig
from mast3r_sfm.errors import ConfigError, WeightsError
from mast3r_sfm.models import registry
from mast3r_sfm.models.base import DenseModel, KeypointModel
from mast3r_sfm.models.mast3r.model import Mast3rModel
from mast3r_sfm.models.registry import (
    PREFERENCE,
    load_model,
    resolve_device,
    resolve_dtype,
    resolve_name,
    usable_models,
)
from mast3r_sfm.models.weights import CATALOGUE, hub_folder, path_by_hand
from mast3r_sfm.types import Preparation
from tests.checkpoints import DUST3R, model_text, random_tensors, write_hub_folder, write_pth

# The widths of a DPT head cannot be stated in the official layouts; a linear head is tiny.
TINY_DUST3R = {**DUST3R, "img_size": (512, 384)}


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights are installed, and no folder beside us has the name of a model."""
    folder = tmp_path / "weights"
    monkeypatch.setenv("MAST3R_SFM_WEIGHTS", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def install_by_hand(name: str, arguments: dict[str, Any]) -> Path:
    path = path_by_hand(CATALOGUE[name])
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_pth(path, model_text(arguments), random_tensors(arguments))


def test_the_default_model_is_usable() -> None:
    assert usable_models()["xfeat"] == ""
    assert resolve_name("auto") == "xfeat"
    assert resolve_name("xfeat") == "xfeat"


def test_mast3r_is_preferred_as_soon_as_its_weights_are_there() -> None:
    assert list(usable_models()) == list(PREFERENCE) == ["mast3r", "xfeat"]
    assert "mast3r-sfm weights download mast3r" in usable_models()["mast3r"]
    install_by_hand("dust3r", TINY_DUST3R)
    assert resolve_name("auto") == "xfeat"  # DUSt3R's are no match for it
    install_by_hand("mast3r", TINY_DUST3R)
    assert usable_models() == {"mast3r": "", "xfeat": ""}
    assert resolve_name("auto") == "mast3r"


def test_a_loaded_model_is_what_was_asked_for() -> None:
    model = load_model("xfeat", device="cpu", config=EncodeConfig(keypoints=100))
    assert model.name == "xfeat"
    assert isinstance(model, KeypointModel)
    assert not isinstance(model, DenseModel)
    assert len(model.fingerprint) == 64
    assert model.retrieval_tokens > 0


def test_the_number_of_keypoints_changes_the_fingerprint() -> None:
    one, two, again = (load_model("xfeat", device="cpu", config=EncodeConfig(keypoints=n)) for n in (100, 200, 100))
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint == again.fingerprint


def test_the_size_of_images_is_the_settings_or_what_suits_the_model() -> None:
    default, small = (
        load_model("xfeat", device="cpu", config=EncodeConfig(keypoints=100, max_size_px=size)) for size in (0, 640)
    )
    assert default.preparation == Preparation(size_px=1024)
    assert small.preparation == Preparation(size_px=640)
    assert default.fingerprint == small.fingerprint  # the preparation is part of the cache keys by itself


@pytest.mark.parametrize("name", ["xfeet", "XFEAT", "", "mast3r_sfm", "MASt3R", "weights.ckpt"])
def test_unknown_models(name: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no model.*known: auto, xfeat, mast3r, dust3r, .*path of a check"):
        resolve_name(name)
    with pytest.raises(ConfigError, match="there is no model"):
        load_model(name)


def test_auto_takes_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "mast3r_problem", lambda: "no weights")
    assert resolve_name("auto") == "xfeat"
    assert resolve_name("mast3r") == "mast3r"  # asked for by name: loading says what is missing
    monkeypatch.setattr(registry, "_xfeat_problem", lambda: "too old")
    assert usable_models() == {"mast3r": "no weights", "xfeat": "too old"}
    with pytest.raises(WeightsError, match="no model is usable: mast3r: no weights; xfeat: too old"):
        resolve_name("auto")
    monkeypatch.setattr(registry, "mast3r_problem", lambda: "")
    assert resolve_name("auto") == "mast3r"


@pytest.mark.parametrize("name", CATALOGUE)
def test_official_weights_that_are_not_installed(name: str) -> None:
    assert resolve_name(name) == name
    with pytest.raises(WeightsError, match=f"the weights {name} are not installed: mast3r-sfm weights download {name}"):
        load_model(name, device="cpu")


@pytest.mark.parametrize("name", ["dust3r", "dust3r-224-linear"])
def test_official_weights_by_name(name: str) -> None:
    path = install_by_hand(name, TINY_DUST3R)
    model = load_model(name, device="cpu")
    assert isinstance(model, DenseModel)
    assert not isinstance(model, KeypointModel)
    assert model.name == "dust3r"
    assert model.fingerprint == load_model(str(path), device="cpu").fingerprint
    # What was downloaded goes before what was put there by hand.
    write_hub_folder(hub_folder(CATALOGUE[name]), {**TINY_DUST3R, "img_size": (64, 48)}, random_tensors(TINY_DUST3R))
    assert load_model(name, device="cpu").preparation.size_px == 64


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "here/a", "./a", "/somewhere/a", "~/a"])
def test_paths_are_taken_for_paths(name: str) -> None:
    assert resolve_name(name) == name
    with pytest.raises(WeightsError, match=f"there is no file or folder of weights at {name.removeprefix('./')}"):
        load_model(name, device="cpu")


def test_a_folder_beside_us_is_a_path_but_no_model_is_hidden_by_it(tmp_path: Path) -> None:
    write_hub_folder(tmp_path / "mine", TINY_DUST3R, random_tensors(TINY_DUST3R))
    assert resolve_name("mine") == "mine"
    assert load_model("mine", device="cpu").name == "dust3r"
    write_hub_folder(tmp_path / "xfeat", TINY_DUST3R, random_tensors(TINY_DUST3R))
    assert load_model("xfeat", device="cpu").name == "xfeat"


def test_checkpoints_of_all_layouts(tmp_path: Path) -> None:
    tensors = random_tensors(TINY_DUST3R)
    folder = write_hub_folder(tmp_path / "hub", TINY_DUST3R, tensors)
    safetensors.torch.save_file(tensors, tmp_path / "lone.safetensors")
    (tmp_path / "lone.json").write_bytes((folder / "config.json").read_bytes())
    pth = write_pth(tmp_path / "official.pth", model_text(TINY_DUST3R), tensors)
    paths = (folder, folder / "model.safetensors", tmp_path / "lone.safetensors", pth)
    models = [load_model(str(path), device="cpu") for path in paths]
    for model in models:
        assert isinstance(model, Mast3rModel)
        assert model.preparation == Preparation(size_px=512, patch_px=16)
    assert models[0].fingerprint == models[1].fingerprint


def test_a_checkpoint_that_does_not_fit_its_configuration(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "odd.pth", model_text({**TINY_DUST3R, "enc_depth": 3}), random_tensors(TINY_DUST3R))
    with pytest.raises(WeightsError, match=r"odd\.pth.* 12 tensors are missing: enc_blocks\.2\."):
        load_model(str(path), device="cpu")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)],
)
def test_settings_reach_the_model(tmp_path: Path, dtype: DecoderType, expected: torch.dtype) -> None:
    folder = write_hub_folder(tmp_path / "hub", TINY_DUST3R, random_tensors(TINY_DUST3R))
    config = EncodeConfig(max_size_px=160, keypoints=100)
    model = load_model(str(folder), device="cpu", dtype=dtype, tf32=True, config=config)
    assert isinstance(model, Mast3rModel)
    assert model.preparation == Preparation(size_px=160, patch_px=16)
    assert model._network.dec_blocks2[0].mlp.fc1.weight.dtype == expected
    assert model._network.enc_blocks[0].mlp.fc1.weight.dtype == torch.float32
    assert model._precision.tf32
    assert not load_model(str(folder), device="cpu")._precision.tf32  # type: ignore[attr-defined]


def test_types_of_a_decoder() -> None:
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda:1", "mps"))
    assert [resolve_dtype("auto", device) for device in (cpu, cuda, mps)] == [
        torch.float32,
        torch.float16,
        torch.float32,
    ]
    for device in (cpu, cuda, mps):
        assert resolve_dtype("float32", device) == torch.float32
        assert resolve_dtype("float16", device) == torch.float16
        assert resolve_dtype("bfloat16", device) == torch.bfloat16


def test_devices_that_are_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


def test_auto_prefers_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:-1", "gpu", "", "meta", "xpu", "0 1"])
def test_devices_that_do_not_exist(name: str) -> None:
    with pytest.raises(ConfigError, match="write auto, cpu, cuda, cuda:1 or mps"):
        resolve_device(name)


def test_devices_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="cuda:7: this machine has 2 CUDA devices"):
        resolve_device("cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="cuda: this machine has 0 CUDA devices"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="mps: this machine has no MPS device"):
        resolve_device("mps")
