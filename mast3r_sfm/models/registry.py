"""Which models there are, which of them this machine can run, and how they are loaded."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mast3r_sfm.config import KEYPOINTS, DecoderType, EncodeConfig
from mast3r_sfm.errors import ConfigError, WeightsError
from mast3r_sfm.models.base import PairModel
from mast3r_sfm.models.weights import CATALOGUE, find_weights, mast3r_problem, missing_text

PREFERENCE = ("mast3r", "xfeat")
"""What `auto` takes: the first whose weights are installed."""
_CHECKPOINT_SUFFIXES = (".pth", ".safetensors")


def usable_models() -> dict[str, str]:
    """The models of `auto` in order of preference, with "" or the reason why they cannot be used."""
    problems = {"mast3r": mast3r_problem, "xfeat": _xfeat_problem}
    return {name: problems[name]() for name in PREFERENCE}


def resolve_name(name_or_path: str) -> str:
    """The model that a name or path stands for: itself, or for "auto" the best whose weights are installed.

    Raises:
        ConfigError: there is no such model.
        WeightsError: no model is usable.
    """
    if name_or_path == "auto":
        problems = usable_models()
        for candidate, problem in problems.items():
            if not problem:
                return candidate
        raise WeightsError("no model is usable: " + "; ".join(f"{name}: {why}" for name, why in problems.items()))
    if name_or_path in ("xfeat", *CATALOGUE) or _is_path(name_or_path):
        return name_or_path
    known = ", ".join(("auto", "xfeat", *CATALOGUE))
    raise ConfigError(
        f"there is no model {name_or_path!r}; known: {known}, or the path of a checkpoint: a .pth or .safetensors "
        "file, or a folder with config.json and model.safetensors"
    )


def checkpoint_path(name: str) -> Path | None:
    """Where the weights of a model lie, as `read_checkpoint` takes them; None for xfeat, which brings its own.

    Args:
        name: as `resolve_name` gives it.

    Raises:
        WeightsError: they are not installed.
    """
    if name == "xfeat":
        return None
    path = find_weights(name) if name in CATALOGUE else Path(name)
    if path is None:
        raise WeightsError(missing_text(CATALOGUE[name]))
    return path


def load_model(
    name_or_path: str,
    *,
    device: str = "auto",
    dtype: DecoderType = "auto",
    tf32: bool = False,
    compiled: bool = False,
    config: EncodeConfig | None = None,
) -> PairModel:
    """Load a model onto a device.

    Args:
        name_or_path: auto (the best usable one), xfeat, the name of official weights that are installed (mast3r,
            dust3r, …), or a MASt3R or DUSt3R checkpoint: an official .pth, a hub folder with config.json and
            model.safetensors, or a .safetensors file with its configuration beside it.
        device: auto, cpu, cuda, cuda:1 or mps.
        dtype: of the decoder of a pointmap model; auto: float16 on CUDA, float32 elsewhere.
        tf32: let CUDA round float32 products to TF32, several times faster.
        compiled: let torch.compile fuse the blocks of a pointmap model; needs a C++ compiler.
        config: size of the images, and number of keypoints.

    Raises:
        ConfigError: there is no such model or device.
        WeightsError: its weights are missing or broken, or do not fit the network that they state.
    """
    name = resolve_name(name_or_path)
    place = resolve_device(device)
    config = config or EncodeConfig()
    path = checkpoint_path(name)
    if path is None:
        from mast3r_sfm.models.xfeat.model import XFeatModel

        return XFeatModel(config.keypoints or KEYPOINTS, place, config.max_size_px)
    from mast3r_sfm.models.mast3r.checkpoint import read_checkpoint
    from mast3r_sfm.models.mast3r.model import Mast3rModel, Precision

    checkpoint = read_checkpoint(path)
    precision = Precision(decoder=resolve_dtype(dtype, place), tf32=tf32)
    try:
        return Mast3rModel(checkpoint, place, precision=precision, compiled=compiled, max_size_px=config.max_size_px)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def resolve_dtype(name: DecoderType, device: torch.device) -> torch.dtype:
    """What a decoder computes in.

    The official networks were trained in float16 mixed precision, so float16 is safe on CUDA, where it is several times
    as fast; bfloat16 has a range that nothing overflows, and eight times the rounding error.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


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


def _is_path(text: str) -> bool:
    return text.endswith(_CHECKPOINT_SUFFIXES) or os.sep in text or (text != "" and Path(text).is_dir())


def _xfeat_problem() -> str:
    from mast3r_sfm.models.xfeat.weights import package_file

    try:
        package_file("xfeat.pt")
        package_file("xfeat-lighterglue.pt")
    except WeightsError as error:
        return str(error)
    return ""
