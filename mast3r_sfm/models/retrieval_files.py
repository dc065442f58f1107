"""The official files of MASt3R-SfM's retrieval, read without running anything; `weights` says where they lie.

Two files belong together: a model that turns a network's tokens into local features, `…_retrieval_trainingfree.pth`,
and the visual words that such features fall into, `…_retrieval_codebook.pkl`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.plain_pickle import PickledArray, read_plain_pickle
from mast3r_sfm.models.tensor_files import read_pickled
from mast3r_sfm.types import Float32, Float64

_REQUIRED = ("prewhiten", "hdims", "postwhiten", "featweights", "nfeat", "nclusters", "imsize")
# These say how the model was trained.
_WITHOUT_EFFECT = ("pretrained", "freeze_backbone")
_KNOWN = {*_REQUIRED, *_WITHOUT_EFFECT, "residual"}
_IMAGE_SIZE = 512
_MULTIPLES = {"": 1, "k": 1024, "m": 1024**2}
# Far beyond any such model, and small enough that a wrong figure ends in words.
_MAX_SIZE, _MAX_LAYERS = 1 << 24, 16


@dataclass(frozen=True, kw_only=True)
class RetrievalModel:
    """What an official retrieval model states and holds; whether it is consistent is for its user to see."""

    hidden: tuple[int, ...]
    """Widths of the projector's layers; empty: there is none."""
    residual: bool
    """Whether the projector's input is added to its output."""
    prewhitened: bool
    postwhitened: bool
    features: int | float
    """Tokens of highest attention that describe an image; negative: their share of all tokens."""
    words: int
    """Of the codebook that belongs to it."""
    arrays: dict[str, Float64]
    """By the names of the state dict; all finite."""


def read_retrieval_model(path: Path) -> RetrievalModel:
    """Read a `…_retrieval_trainingfree.pth`.

    Raises:
        WeightsError: the file cannot be read, is something else, has settings that are not known, or would have code
            run.
    """
    stored = read_pickled(path)
    try:
        return _model_from(stored)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def read_codebook(path: Path, words: int) -> Float32:
    """The visual words [words, D] of a `…_codebook.pkl`, all finite.

    Args:
        path: the file.
        words: how many the model that it belongs to states.

    Raises:
        WeightsError: the file cannot be read, is something else or of another size, or would have code run.
    """
    stored = read_plain_pickle(path)
    match stored:
        case {"type": "Codebook", "params": {"size": size, **others}, "state": {"centroids": PickledArray() as array}}:
            values = array.values
        case _:
            raise WeightsError(f"{path} holds no codebook of visual words; get it from its publisher")
    if others:
        raise WeightsError(f"{path} has settings that are not known: {_some(sorted(map(str, others)))}")
    if values is None or values.ndim != 2 or not values.size or size != len(values):
        raise WeightsError(f"{path}: its words are no table of the size that it states; get it from its publisher")
    if len(values) != words:
        raise WeightsError(
            f"{path} has {len(values):,} words, but the model beside it asks for {words:,}: they do not belong together"
        )
    # The least and the largest say it of all, without a table of answers a quarter as large as the codebook.
    if not np.isfinite([values.min(), values.max()]).all():
        raise WeightsError(f"{path} holds NaN or infinite values; get it again")
    return values


def _model_from(stored: object) -> RetrievalModel:
    settings = stored.get("args") if isinstance(stored, dict) else None
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    state = stored.get("model") if isinstance(stored, dict) else None
    if not isinstance(settings, dict) or not isinstance(state, dict) or "nfeat" not in settings:
        raise WeightsError(
            "it holds no retrieval model: expected are 'args' with its settings and 'model' with tensors"
        )
    if unknown := sorted(str(name) for name in settings.keys() - _KNOWN):
        raise WeightsError(f"it has settings that are not known, and could change its results: {', '.join(unknown)}")
    if missing := [name for name in _REQUIRED if name not in settings]:
        raise WeightsError(f"it lacks the settings {', '.join(missing)}")
    # Every published description weighs tokens by their norm; names of other weights are not documented.
    if "norm" not in str(settings["featweights"]).lower():
        raise _unsupported("featweights", settings["featweights"])
    if type(settings["imsize"]) is not int or settings["imsize"] != _IMAGE_SIZE:
        raise _unsupported("imsize", settings["imsize"])
    residual = settings.get("residual", False)
    if type(residual) not in (bool, int) or residual not in (0, 1):
        raise _unsupported("residual", residual)
    hidden = _widths(settings["hdims"])
    prewhitened, postwhitened = settings["prewhiten"] is not None, settings["postwhiten"] is not None
    return RetrievalModel(
        hidden=hidden,
        residual=bool(residual),
        prewhitened=prewhitened,
        postwhitened=postwhitened,
        features=_features(settings["nfeat"]),
        words=_words(settings["nclusters"]),
        arrays=_arrays(state, _names(hidden, prewhitened, postwhitened)),
    )


def _widths(value: object) -> tuple[int, ...]:
    parts = value.split("_") if isinstance(value, str) and value else []
    if len(parts) > _MAX_LAYERS:
        raise _unsupported("hdims", value)
    widths = tuple(int(part) for part in parts if part.isdecimal() and len(part) < 9)
    if not isinstance(value, str) or len(widths) < len(parts) or not all(0 < width < _MAX_SIZE for width in widths):
        raise _unsupported("hdims", value)
    return widths


def _features(value: object) -> int | float:
    whole = type(value) is int and 0 < value < _MAX_SIZE
    share = type(value) in (int, float) and -1 <= value < 0  # type: ignore[operator]
    if not whole and not share:
        raise _unsupported("nfeat", value)
    return value  # type: ignore[return-value]


def _words(value: object) -> int:
    """A number, or a text such as "64k" or "1M", of 1024 and 1024²."""
    words = value if type(value) is int else 0
    if isinstance(value, str) and len(value) < 9:
        digits = value.rstrip("kKmM")
        multiple = _MULTIPLES.get(value[len(digits) :].lower())
        words = int(digits) * multiple if digits.isdecimal() and multiple else 0
    if not 0 < words < _MAX_SIZE:
        raise _unsupported("nclusters", value)
    return words


def _unsupported(name: str, value: object) -> WeightsError:
    return WeightsError(f"its setting {name} = {str(value)[:60]!r} is not supported")


def _names(hidden: tuple[int, ...], prewhitened: bool, postwhitened: bool) -> list[str]:
    """The tensors that settings ask for; of the projector, a linear layer, a norm and an activation take turns."""
    names = [f"prewhiten.{name}" for name in "mp" if prewhitened]
    for index in range(len(hidden)):
        places = [3 * index] if index + 1 == len(hidden) else [3 * index, 3 * index + 1]
        names += [f"projector.{place}.{name}" for place in places for name in ("weight", "bias")]
    return names + [f"postwhiten.{name}" for name in "mp" if postwhitened]


def _arrays(state: Mapping[object, object], names: list[str]) -> dict[str, Float64]:
    if missing := [name for name in names if name not in state]:
        raise WeightsError(f"its settings ask for tensors that it lacks: {_some(missing)}")
    if unknown := sorted(str(name) for name in state.keys() - set(names)):
        raise WeightsError(f"it has tensors that its settings do not ask for: {_some(unknown)}")
    tensors = {name: tensor for name, tensor in state.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    for name in names:
        tensor = tensors.get(name)
        plain = tensor is not None and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if tensor is None or not plain or not tensor.is_floating_point():
            raise WeightsError(f"its entry {name} is not a plain array of floating-point numbers")
    # A tensor may repeat one number a million million times.
    stored = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > sum(stored.values()):
        raise WeightsError("its tensors have more numbers than it holds; get it from its publisher")
    arrays = {name: tensor.detach().to(torch.float64).numpy() for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise WeightsError(f"its tensor {name} holds NaN or infinite values; get it again")
    return arrays


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:60] for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
