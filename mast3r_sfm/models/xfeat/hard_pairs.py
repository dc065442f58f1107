"""LighterGlue: the small LightGlue (Lindenberger et al., ICCV 2023) that XFeat's authors trained for its features.

About ten times as slow as nearest neighbours, it also matches pairs on which those find too little.
"""

from __future__ import annotations

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
            # Stopping early and leaving out keypoints takes a third less time; it loses true links on wide
            # baselines, and of an object without texture it lets a wrong one in.
            depth_confidence=-1,
            width_confidence=-1,
            filter_threshold=MIN_CONFIDENCE,
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
        """Indices [M, 2] of matched tokens and their confidence [M] in (0, 1]; the strongest keypoints only."""
        if min(len(first.tokens), len(second.tokens)) == 0:
            return np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
        result = self._network({"image0": self._input(first), "image1": self._input(second)})
        matches, scores = result["matches"][0], result["scores"][0]
        return matches.cpu().numpy().astype(np.int64), scores.float().cpu().numpy()

    def _input(self, encoding: Encoding) -> dict[str, torch.Tensor]:
        # Upright network pixels: the transformer learned on upright photos.
        xy = encoding.transform.to_network(encoding.xy[:MAX_KEYPOINTS].astype(np.float64))
        size = np.array(encoding.network_size)
        return {
            "keypoints": torch.from_numpy(np.clip(xy, 0, size).astype(np.float32))[None].to(self._device),
            "descriptors": torch.from_numpy(encoding.tokens[:MAX_KEYPOINTS].astype(np.float32))[None].to(self._device),
            "image_size": torch.from_numpy(size.astype(np.float32))[None].to(self._device),
        }


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
