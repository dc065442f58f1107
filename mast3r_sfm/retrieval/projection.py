"""From a network's tokens to local features by the official retrieval model of MASt3R-SfM.

Source: Duisterhof et al., "MASt3R-SfM: a fully-integrated solution for unconstrained structure-from-motion", 2024,
section 4.1; the attention of a token by its norm as in Weinzaepfel et al., "Learning super-features for image
retrieval", ICLR 2022. Layers and their order are those that reproduce retrieval.npz.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.special
from numpy.typing import NDArray

from mast3r_sfm.errors import ShapeError, WeightsError
from mast3r_sfm.models.retrieval_files import RetrievalModel
from mast3r_sfm.retrieval.whitening import Whitening
from mast3r_sfm.types import Encoding, Float32, Float64

_NORM_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A linear layer, after which all but the last are normalised and go through a GELU."""

    weight: Float64
    """[out, in]."""
    bias: Float64
    """[out]."""
    norm: tuple[Float64, Float64] | None
    """[out] weight and bias of the LayerNorm; None: the last layer."""

    def apply(self, values: Float64) -> Float64:
        values = values @ self.weight.T + self.bias
        if self.norm is None:
            return values
        values = values - values.mean(axis=1, keepdims=True)
        values /= np.sqrt((values**2).mean(axis=1, keepdims=True) + _NORM_EPSILON)
        values = values * self.norm[0] + self.norm[1]
        # The exact GELU: x·Φ(x).
        return np.asarray(values * scipy.special.ndtr(values), dtype=np.float64)


class Projector:
    """Pre-whitening, projector, attention, post-whitening; each but the attention may be left out by the model.

    It computes in double precision, for the reason that `Whitening.apply` gives.
    """

    def __init__(self, model: RetrievalModel) -> None:
        """Build it from what a file holds.

        Raises:
            WeightsError: a tensor is missing, unknown, or of a wrong shape.
        """
        _check_names(model)
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

    def project(self, tokens: NDArray[Any]) -> tuple[Float64, Float64]:
        """Pre-whiten and project tokens.

        Args:
            tokens: [T, C], all tokens of an image.

        Returns:
            [T, E] projected tokens; [T] their attention.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.channels:
            raise ShapeError(f"tokens have shape {tokens.shape}, expected [*, {self.channels}]")
        whitened = values = self._pre.map(tokens) if self._pre else tokens.astype(np.float64)
        for layer in self._layers:
            values = layer.apply(values)
        if self._residual:
            values = values + whitened
        return values, np.linalg.norm(values, axis=1)

    def finish(self, projected: Float64) -> Float32:
        """Post-whiten projected tokens [K, E] into local features [K, D]."""
        return (self._post.map(projected) if self._post else projected).astype(np.float32)

    def _widths(self) -> list[tuple[str, int, int]]:
        """Name, input and output width of each step."""
        widths = [(f"projector.{3 * index}", *layer.weight.shape[::-1]) for index, layer in enumerate(self._layers)]
        if self._pre:
            widths.insert(0, ("prewhiten", *self._pre.projection.shape))
        if self._post:
            widths.append(("postwhiten", *self._post.projection.shape))
        return widths


@dataclass(frozen=True, kw_only=True)
class ProjectedTokens:
    """The local features of images by the official model; implements `features.LocalFeatures`."""

    projector: Projector
    count: int | float
    """Tokens of highest attention that describe an image; negative: their share of all tokens, rounded down."""

    def of(self, encoding: Encoding) -> Float32:
        """The local features [K, D] of one image, those of highest attention first; of equals, the earlier first."""
        projected, attention = self.projector.project(encoding.tokens)
        count = self.count if self.count > 0 else -self.count * len(attention)
        chosen = np.argsort(-attention, kind="stable")[: int(count)]
        return self.projector.finish(projected[chosen])


def _check_names(model: RetrievalModel) -> None:
    """Whether the tensors are those that the settings ask for."""
    expected = [f"prewhiten.{name}" for name in "mp" if model.prewhitened]
    expected += [f"postwhiten.{name}" for name in "mp" if model.postwhitened]
    for index in range(len(model.hidden)):
        places = [3 * index] if index + 1 == len(model.hidden) else [3 * index, 3 * index + 1]
        expected += [f"projector.{place}.{name}" for place in places for name in ("weight", "bias")]
    if missing := [name for name in expected if name not in model.arrays]:
        raise WeightsError(f"its settings ask for tensors that it lacks: {_some(missing)}")
    if unknown := sorted(model.arrays.keys() - set(expected)):
        raise WeightsError(f"it has tensors that its settings do not ask for: {_some(unknown)}")


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


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
        layers.append(
            _Layer(
                weight=weight,
                bias=arrays[f"{linear}.bias"],
                norm=None if last else (arrays[f"{norm}.weight"], arrays[f"{norm}.bias"]),
            )
        )
    return tuple(layers)


def _shape(array: Float64) -> str:
    return " × ".join(map(str, array.shape)) or "()"
