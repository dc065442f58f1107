"""Checkpoints of MASt3R and DUSt3R: the tensors, and the architecture that they belong to.

Three layouts are read: the official `.pth`; a hub folder of config.json and model.safetensors; and a `.safetensors`
file with its configuration beside it. Nothing that a file may hold is run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.mast3r.architecture import Architecture
from mast3r_sfm.models.mast3r.arguments import architecture_from, parse_model_text
from mast3r_sfm.models.tensor_files import read_pickled, read_safetensors, sha256_of

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

_MAX_CONFIG_BYTES = 1_000_000
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
# Two names of one tensor: a list of the four layers, which counts from 0, and the layers by themselves, from 1.
_IN_LIST = re.compile(r"(?P<start>.*\.scratch\.)layer_rn\.(?P<index>[0-3])\.weight")
_BY_ITSELF = re.compile(r"(?P<start>.*\.scratch\.)layer(?P<number>[1-4])_rn\.weight")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a network is built from."""

    architecture: Architecture
    tensors: dict[str, Tensor]
    """By the names of the official state dicts, all of them: a tensor with two names stands under both. On the CPU,
    and as a rule mapped into memory rather than copied."""
    sha256: str
    """Of the weight file; where the configuration is a file of its own, of both files' sha256."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """The files of one checkpoint."""

    weights: Path
    config: Path | None
    """None where the weight file states its architecture itself."""

    @property
    def all(self) -> tuple[Path, ...]:
        """The configuration first."""
        return (self.weights,) if self.config is None else (self.config, self.weights)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read an official `.pth`, a hub folder, or a `.safetensors` file with X.json or config.json beside it.

    Whether names and shapes of the tensors fit the architecture is not looked at here: `network.check_tensors` does it.

    Raises:
        WeightsError: there is no such file, it is of another kind, broken, or would have code run.
    """
    files = find_files(path)
    if files.config is None:
        stored = read_pickled(files.weights)
        digest = sha256_of(files.weights)
    else:
        both = [sha256_of(file) for file in files.all]
        digest = hashlib.sha256("".join(both).encode()).hexdigest()
    try:
        if files.config is None:
            architecture, tensors = _from_pickled(stored)
        else:
            architecture = _read_config(files.config)
            tensors = _from_safetensors(files.weights)
        _check_values(tensors)
        return Checkpoint(architecture=architecture, tensors=_completed(tensors), sha256=digest)
    except WeightsError as error:
        raise error if str(path) in str(error) else WeightsError(f"{path}: {error}") from error


def find_files(path: Path) -> CheckpointFiles:
    """The files that make up the checkpoint at `path`; they are not looked into.

    Raises:
        WeightsError: there is no checkpoint, or one of a layout that is not supported.
    """
    try:
        if path.is_dir():
            return _files_of_folder(path)
        if not path.is_file():
            raise WeightsError(f"there is no file or folder of weights at {path}")
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix == ".json":
        raise WeightsError(f"{path} is a configuration or an index; name the weights, or their folder {path.parent}")
    if path.suffix != ".safetensors":
        return CheckpointFiles(weights=path, config=None)
    if _SHARD.search(path.name):
        raise _sharded(path)
    for config in (path.with_suffix(".json"), path.with_name(CONFIG)):
        if config.is_file():
            return CheckpointFiles(weights=path, config=config)
    raise WeightsError(
        f"{path} does not say how its network is built: put its configuration beside it, "
        f"as {path.with_suffix('.json').name} or {CONFIG}"
    )


def _files_of_folder(folder: Path) -> CheckpointFiles:
    files = CheckpointFiles(weights=folder / WEIGHTS, config=folder / CONFIG)
    missing = [file.name for file in files.all if not file.is_file()]
    if not missing:
        return files
    names = sorted(file.name for file in folder.iterdir())
    for name in names:
        if _SHARD.search(name) or name.endswith(".safetensors.index.json"):
            raise _sharded(folder / name)
    others = [name for name in names if name.endswith((".pth", ".pt", ".ckpt", ".safetensors")) and name != WEIGHTS]
    hint = f"; or name a file in it, as {folder / others[0]}" if others else ""
    raise WeightsError(f"the folder {folder} has no {' and no '.join(missing)}: both files are needed{hint}")


def _sharded(path: Path) -> WeightsError:
    return WeightsError(f"{path} belongs to weights that are spread over several files, which is not supported")


def _read_config(path: Path) -> Architecture:
    """From JSON in the form of the hub, or with the class name, "args" and "dpt_overrides" apart."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_CONFIG_BYTES + 1)
        config = json.loads(text) if len(text) <= _MAX_CONFIG_BYTES else None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} does not describe a network")
    flat = not isinstance(config.get("args"), dict)
    class_name = config.pop("class_name", None)
    arguments, dpt = (config, None) if flat else (config["args"], config.get("dpt_overrides"))
    if not isinstance(class_name, str | None) or not isinstance(dpt, dict | None):
        raise WeightsError(f"{path} does not describe a network: class_name must be a text, dpt_overrides a mapping")
    try:
        return architecture_from(arguments, class_name=class_name, dpt=dpt)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _from_pickled(stored: object) -> tuple[Architecture, dict[str, Tensor]]:
    if not isinstance(stored, dict):
        raise WeightsError("it holds no weights of MASt3R or DUSt3R, but something else")
    settings = stored.get("args")
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    text = settings.get("model") if isinstance(settings, dict) else None
    state = stored.get("model")
    if not isinstance(text, str) or not isinstance(state, dict):
        raise WeightsError(f"it holds no weights of MASt3R or DUSt3R; {_what_else(stored, settings)}")
    class_name, arguments = parse_model_text(text)
    return architecture_from(arguments, class_name=class_name), dict(state)


def _what_else(stored: Mapping[object, object], settings: object) -> str:
    """What a dict that is no checkpoint of ours seems to be."""
    if {"dune_backbone_name", "mast3r_model_str"} & stored.keys():
        return "it seems to be a DUNE-MASt3R, which is not supported"
    if isinstance(settings, dict) and {"prewhiten", "postwhiten", "nfeat", "hdims"} & settings.keys():
        return "it seems to be the retrieval model that belongs to a MASt3R, not a MASt3R"
    if stored and all(isinstance(value, Tensor) for value in stored.values()):
        return "it holds tensors, but not the arguments of the network ('args') that they belong to"
    names = ", ".join(sorted(map(str, stored))[:8])
    return f"expected are 'args' with the network's arguments and 'model' with its tensors, found: {names or 'nothing'}"


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    tensors, metadata = read_safetensors(path)
    # The hub's client stores a tensor with several names once, and lists its other names.
    for name, stored in metadata.items():
        if name not in tensors and stored in tensors:
            tensors[name] = tensors[stored]
    return tensors


def _check_values(tensors: Mapping[str, object]) -> None:
    for name, value in tensors.items():
        if not isinstance(name, str) or type(value) not in (Tensor, Parameter) or not isinstance(value, Tensor):
            raise WeightsError(f"its entry {name!r} is not a tensor with a name")
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
        if not plain or not value.is_floating_point():
            raise WeightsError(f"its tensor {name} is not a plain array of floating-point numbers")


def _completed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both names of shared tensors, and the second decoder where a file has only one."""
    result = {name: tensor.detach() for name, tensor in tensors.items()}
    for name in list(result):
        twin = _other_name(name)
        if twin is not None and not torch.equal(result[name], result.setdefault(twin, result[name])):
            raise WeightsError(f"{name} and {twin} are two names of one tensor, but hold different values")
    if not any(name.startswith("dec_blocks2.") for name in result):
        result |= {
            f"dec_blocks2.{name.removeprefix('dec_blocks.')}": tensor
            for name, tensor in result.items()
            if name.startswith("dec_blocks.")
        }
    return result


def _other_name(name: str) -> str | None:
    if match := _IN_LIST.fullmatch(name):
        return f"{match['start']}layer{int(match['index']) + 1}_rn.weight"
    if match := _BY_ITSELF.fullmatch(name):
        return f"{match['start']}layer_rn.{int(match['number']) - 1}.weight"
    return None
