"""LighterGlue: the small LightGlue (Lindenberger et al., ICCV 2023) that XFeat's authors trained for its features.

About ten times as slow as nearest neighbours, it also matches pairs on which those find too little.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.xfeat.weights import read_weights
from mast3r_sfm.types import Encoding

MIN_CONFIDENCE = 0.1
MAX_KEYPOINTS = 2048
"""Attention costs the square of their number; with this many, a pair takes a third of a second on two cores."""
# The architecture that the weights were trained for.
LAYERS, HEADS, WIDTH, INPUT = 6, 1, 96, 64
NEEDED_AFTER = {2: 25, 4: 20, LAYERS: 1}
"""Matches that are needed after so many layers to go on. Of 297 pairs of all kinds, those with 30 matches or more in
the end have 28 or more after two layers, and as many after four; of different places, most have fewer than needed."""


class HardPairMatcher:
    """Matches the keypoints of two encodings with a transformer over both images."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Load the weights at `path`. Raises WeightsError where they do not fit."""
        from kornia.feature.lightglue import LightGlue

        self._device = device
        self._network = LightGlue(
            None,  # type: ignore[arg-type]  # annotated as str, documented to take None: no weights of kornia's own
            input_dim=INPUT,
            descriptor_dim=WIDTH,
            n_layers=LAYERS,
            num_heads=HEADS,
        )
        try:
            # Not strict: the file also carries bookkeeping of the training.
            missing, _ = self._network.load_state_dict(_renamed(read_weights(path, "LighterGlue")), strict=False)
        except RuntimeError as error:
            raise WeightsError(f"{path} does not hold LighterGlue's weights: {error}") from error
        learned = {name for name, _ in self._network.named_parameters()}
        if absent := learned.intersection(missing):
            raise WeightsError(f"{path} lacks {len(absent)} of LighterGlue's weights, such as {min(absent)}")
        if device.type == "cpu":
            for layer in self._network.transformers:
                layer.cross_attn = _CrossAttention(layer.get_submodule("cross_attn"))
        self._network.to(device).eval()

    @torch.inference_mode()
    def match(self, first: Encoding, second: Encoding) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Indices [M, 2] of matched tokens, ascending by the first, and their confidence [M] in (0, 1].

        Of the strongest keypoints only; nothing where the first layers say that the images share nothing.
        """
        tokens, places = zip(*(self._input(encoding) for encoding in (first, second)), strict=True)
        found = np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
        if min(one.shape[1] for one in tokens) == 0:
            return found
        for number, layer in enumerate(self._network.transformers):
            tokens = layer(*tokens, *places)
            if number + 1 in NEEDED_AFTER:
                found = self._assigned(number, *tokens)
                if len(found[0]) < NEEDED_AFTER[number + 1]:
                    return found[0][:0], found[1][:0]
        return found

    def _input(self, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [1, M, D] and the encoding of their places."""
        # Upright network pixels: the transformer learned on upright photos.
        xy = encoding.transform.to_network(encoding.xy[:MAX_KEYPOINTS].astype(np.float64))
        size = np.array(encoding.network_size)
        # The centre is zero, and half of the longer side is one.
        place = (np.clip(xy, 0, size) - size / 2) / (size.max() / 2)
        tokens = encoding.tokens[:MAX_KEYPOINTS].astype(np.float32)
        return (
            self._network.get_submodule("input_proj")(torch.from_numpy(tokens)[None].to(self._device)),
            self._network.get_submodule("posenc")(torch.from_numpy(place.astype(np.float32))[None].to(self._device)),
        )

    def _assigned(
        self, layer: int, first: torch.Tensor, second: torch.Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Matches [M, 2] and their confidence [M], by what a layer says of tokens [1, M, D] and [1, N, D].

        A match's confidence is the softmax of its similarity over the first image's tokens, times that over the
        second's, times the probabilities that either token has a match; matches are each other's most confident.
        """
        head = self._network.log_assignment[layer]
        project, matchability = head.get_submodule("final_proj"), head.get_submodule("matchability")
        one, other = (project(tokens)[0] / WIDTH**0.25 for tokens in (first, second))
        likely, likely_too = (functional.logsigmoid(matchability(tokens))[0, :, 0] for tokens in (first, second))
        score = one @ other.T
        by_row, by_column = (likely - score.logsumexp(dim=1))[:, None], likely_too - score.logsumexp(dim=0)
        score = score.mul_(2).add_(by_row).add_(by_column)
        pairs = (score > math.log(MIN_CONFIDENCE)).nonzero()
        confidence = score[pairs[:, 0], pairs[:, 1]].exp().float().cpu().numpy()
        index = pairs.cpu().numpy().astype(np.int64)
        # Whatever is more confident than one of these is among them too.
        order = np.argsort(-confidence, kind="stable")
        best, best_too = (order[np.unique(index[order, side], return_index=True)[1]] for side in (0, 1))
        kept = np.intersect1d(best, best_too)
        return index[kept], confidence[kept]


class _CrossAttention(torch.nn.Module):
    """A layer's attention between both images in half the time of kornia's on a CPU: no matrix is held or turned."""

    def __init__(self, theirs: torch.nn.Module) -> None:
        super().__init__()
        self.to_qk, self.to_v = theirs.get_submodule("to_qk"), theirs.get_submodule("to_v")
        self.to_out, self.ffn = theirs.get_submodule("to_out"), theirs.get_submodule("ffn")

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [1, M, D] and [1, N, D] with what they found in each other."""
        keys = [self.to_qk(tokens)[:, None] for tokens in (first, second)]  # one head
        values = [self.to_v(tokens)[:, None] for tokens in (first, second)]
        found = (
            functional.scaled_dot_product_attention(keys[0], keys[1], values[1])[:, 0],
            functional.scaled_dot_product_attention(keys[1], keys[0], values[0])[:, 0],
        )
        one, other = (
            tokens + self.ffn(torch.cat([tokens, self.to_out(message)], dim=-1))
            for tokens, message in zip((first, second), found, strict=True)
        )
        return one, other


def _renamed(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The file's names to those of kornia's LightGlue, which groups both attentions of a layer."""
    return {
        re.sub(r"^(self_attn|cross_attn)\.(\d+)\.", r"transformers.\2.\1.", name.removeprefix("matcher.")): value
        for name, value in stored.items()
    }
