"""From a network's tokens to local features by the official retrieval model of MASt3R-SfM.

Source: Duisterhof et al., "MASt3R-SfM: a fully-integrated solution for unconstrained structure-from-motion", 2024,
section 4.1; the attention of a token by its norm as in Weinzaepfel et al., "Learning super-features for image
retrieval", ICLR 2022. Layers and their order are those that reproduce retrieval.npz.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from mast3r_sfm.errors import ShapeError, WeightsError
from mast3r_sfm.models.retrieval_files import RetrievalModel
from mast3r_sfm.retrieval.whitening import Whitening
from mast3r_sfm.types import Encoding, Float32, Float64

_NORM_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A linear layer, after which all but the last are normalised and go through a GELU; all float32."""

    weight: Tensor
    """[out, in]."""
    bias: Tensor
    """[out]."""
    norm: tuple[Tensor, Tensor] | None
    """[out] weight and bias of the LayerNorm; None: the last layer."""

    def apply(self, values: Tensor) -> Tensor:
        values = functional.linear(values, self.weight, self.bias)
        if self.norm is None:
            return values
        return functional.gelu(functional.layer_norm(values, self.bias.shape, *self.norm, _NORM_EPSILON))


class Projector:
    """Pre-whitening, projector, attention, post-whitening; each but the attention may be left out by the model.

    The whitenings compute in double precision, the projector in single, as the reference does: the local features are
    then the same to the last bit, and so are the words and codes that follow from them.
    """

    def __init__(self, model: RetrievalModel) -> None:
        """Build it from what a file holds.

        Raises:
            WeightsError: a tensor has a wrong shape, or the steps do not fit each other.
        """
        arrays = model.arrays
        self._pre = _whitening(arrays, "prewhiten") if model.prewhitened else None
        self._layers = _layers(arrays, model.hidden)
        self._residual = model.residual
        self._post = _whitening(arrays, "postwhiten") if model.postwhitened else None
        widths = self._widths()
        if not widths:
            raise WeightsError("it neither whitens nor projects: nothing says how wide its tokens are")
        for (left, _, produced), (right, taken, _) in pairwise(widths):
            if produced != taken:
                raise WeightsError(f"its {left} gives {produced} channels, but its {right} takes {taken}")
        if self._residual and (not self._layers or self._layers[0].weight.shape[1] != len(self._layers[-1].bias)):
            raise WeightsError("its setting residual adds the projector's input to its output, but their widths differ")
        self.channels: int = widths[0][1]
        """Of the tokens that it takes."""
        self.dimension: int = widths[-1][2]
        """Of the local features that it gives."""

    def local_features(self, tokens: NDArray[Any], count: int | float) -> Float32:
        """What describes an image.

        Args:
            tokens: [T, C], all of the image's.
            count: how many of highest attention; negative: their share of all, rounded down.

        Returns:
            [K, D], those of highest attention first.
        """
        projected, attention = self.project(tokens)
        return self.finish(projected[strongest(attention, count)])

    def project(self, tokens: NDArray[Any]) -> tuple[Float32, Float32]:
        """Pre-whiten and project tokens.

        Args:
            tokens: [T, C], all tokens of an image.

        Returns:
            [T, E] projected tokens; [T] their attention.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.channels:
            raise ShapeError(f"tokens have shape {tokens.shape}, expected [*, {self.channels}]")
        whitened = values = torch.from_numpy(self._pre.apply(tokens) if self._pre else tokens.astype(np.float32))
        for layer in self._layers:
            values = layer.apply(values)
        if self._residual:
            values = values + whitened
        return values.numpy(), values.norm(dim=1).numpy()

    def finish(self, projected: Float32) -> Float32:
        """Post-whiten projected tokens [K, E] into local features [K, D]."""
        return self._post.apply(projected) if self._post else projected

    def _widths(self) -> list[tuple[str, int, int]]:
        """Name, input and output width of each step."""
        widths = [
            (f"projector.{3 * index}", layer.weight.shape[1], len(layer.bias))
            for index, layer in enumerate(self._layers)
        ]
        if self._pre:
            widths.insert(0, ("prewhiten", *2 * (len(self._pre.mean),)))
        if self._post:
            widths.append(("postwhiten", *2 * (len(self._post.mean),)))
        return widths


@dataclass(frozen=True, kw_only=True)
class ProjectedTokens:
    """The local features of images by the official model; implements `features.LocalFeatures`."""

    projector: Projector
    count: int | float
    """Tokens of highest attention that describe an image; negative: their share of all tokens, rounded down."""

    def of(self, encoding: Encoding) -> Float32:
        """The local features [K, D] of one image, those of highest attention first."""
        return self.projector.local_features(encoding.tokens, self.count)


def strongest(attention: Float32, count: int | float) -> NDArray[np.int64]:
    """Tokens [K] of highest attention [T], highest first; of equals, the earlier one first; `count` as above."""
    wanted = count if count > 0 else -count * len(attention)
    return np.argsort(-attention, kind="stable")[: int(wanted)]


def _whitening(arrays: dict[str, Float64], name: str) -> Whitening:
    mean, projection = arrays[f"{name}.m"], arrays[f"{name}.p"]
    if mean.ndim != 2 or projection.shape != (mean.size, mean.size) or mean.shape != (1, mean.size) or not mean.size:
        raise WeightsError(
            f"its {name}.m of shape {_shape(mean)} and {name}.p of shape {_shape(projection)} must be 1 × C and C × C"
        )
    return Whitening(mean=mean[0], projection=projection)


def _layers(arrays: dict[str, Float64], hidden: tuple[int, ...]) -> tuple[_Layer, ...]:
    layers = []
    for index, width in enumerate(hidden):
        linear, norm = f"projector.{3 * index}", f"projector.{3 * index + 1}"
        weight = arrays[f"{linear}.weight"]
        if weight.ndim != 2:
            raise WeightsError(f"its {linear}.weight has shape {_shape(weight)}, expected are two sizes")
        taken = hidden[index - 1] if index else weight.shape[1]
        shapes: dict[str, tuple[int, ...]] = {f"{linear}.weight": (width, taken), f"{linear}.bias": (width,)}
        last = index + 1 == len(hidden)
        if not last:
            shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
        for name, shape in shapes.items():
            if arrays[name].shape != shape or not arrays[name].size:
                wanted = " × ".join(map(str, shape))
                raise WeightsError(f"its {name} has shape {_shape(arrays[name])}, expected {wanted}")
        values = [torch.from_numpy(arrays[name].astype(np.float32)) for name in shapes]
        layers.append(_Layer(weight=values[0], bias=values[1], norm=None if last else (values[2], values[3])))
    return tuple(layers)


def _shape(array: Float64) -> str:
    return " × ".join(map(str, array.shape)) or "()"
