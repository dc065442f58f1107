"""Which models there are, and which of them this machine can run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mast3r_sfm.config import EncodeConfig
from mast3r_sfm.errors import ConfigError, WeightsError
from mast3r_sfm.models.base import PairModel


def _load_xfeat(config: EncodeConfig, device: torch.device) -> PairModel:
    from mast3r_sfm.models.xfeat.model import XFeatModel

    return XFeatModel(config.keypoints, device, config.max_size_px)


def _xfeat_problem() -> str:
    from mast3r_sfm.models.xfeat.weights import weights_path

    try:
        weights_path("xfeat.pt")
        weights_path("xfeat-lighterglue.pt")
    except WeightsError as error:
        return str(error)
    return ""


# By preference of `auto`: the first usable one is taken.
_MODELS: dict[str, tuple[Callable[[EncodeConfig, torch.device], PairModel], Callable[[], str]]] = {
    "xfeat": (_load_xfeat, _xfeat_problem),
}


def usable_models() -> dict[str, str]:
    """Every model by name, in the order of preference of `auto`, with "" or the reason why it cannot be used."""
    return {name: problem() for name, (_, problem) in _MODELS.items()}


def resolve_name(name: str) -> str:
    """The model that `name` stands for: itself, or for "auto" the best whose weights are installed.

    Raises:
        ConfigError: there is no such model.
        WeightsError: no model is usable.
    """
    if name != "auto":
        if name not in _MODELS:
            raise ConfigError(f"there is no model {name!r}; known: auto, {', '.join(_MODELS)}")
        return name
    problems = usable_models()
    for candidate, problem in problems.items():
        if not problem:
            return candidate
    raise WeightsError("no model is usable: " + "; ".join(f"{name}: {why}" for name, why in problems.items()))


def load_model(name: str, *, device: str = "auto", config: EncodeConfig | None = None) -> PairModel:
    """Load a model by name ("auto" for the best usable one) onto a device.

    Raises:
        ConfigError: there is no such model or device.
        WeightsError: its weights are missing or broken.
    """
    loader, _ = _MODELS[resolve_name(name)]
    return loader(config or EncodeConfig(), resolve_device(device))


def resolve_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:1, mps → a device that is there. Raises ConfigError where it is not."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: write auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device {name}: this machine has no MPS device")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"--device {name}: write auto, cpu, cuda, cuda:1 or mps")
    return device
