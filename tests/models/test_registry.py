"""Models and devices by name."""

from __future__ import annotations

import pytest
import torch

from mast3r_sfm.config import EncodeConfig
from mast3r_sfm.errors import ConfigError, WeightsError
from mast3r_sfm.models import registry
from mast3r_sfm.models.base import DenseModel, KeypointModel
from mast3r_sfm.models.registry import load_model, resolve_device, resolve_name, usable_models
from mast3r_sfm.types import Preparation


def test_the_default_model_is_usable() -> None:
    assert usable_models()["xfeat"] == ""
    assert resolve_name("auto") in usable_models()
    assert resolve_name("xfeat") == "xfeat"


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


@pytest.mark.parametrize("name", ["xfeet", "XFEAT", "", "mast3r_sfm"])
def test_unknown_models(name: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no model.*known: auto, .*xfeat"):
        resolve_name(name)
    with pytest.raises(ConfigError, match="there is no model"):
        load_model(name)


def test_auto_takes_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(problem: str) -> tuple[object, object]:
        return lambda *_: None, lambda: problem

    monkeypatch.setattr(registry, "_MODELS", {"best": make("no weights"), "good": make(""), "plain": make("")})
    assert resolve_name("auto") == "good"
    assert resolve_name("best") == "best"  # asked for by name: loading says what is missing
    monkeypatch.setattr(registry, "_MODELS", {"best": make("no weights"), "good": make("too old")})
    with pytest.raises(WeightsError, match="no model is usable: best: no weights; good: too old"):
        resolve_name("auto")


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


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "gpu", "", "meta", "xpu", "0 1"])
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
