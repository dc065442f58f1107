"""Shapes of a MASt3R or DUSt3R network, as its checkpoint states them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from mast3r_sfm.errors import WeightsError

Head = Literal["linear", "dpt", "catmlp+dpt"]


@dataclass(frozen=True, kw_only=True)
class DptWidths:
    """Channels inside a DPT head (Ranftl et al., 2021); the defaults are those of the official models."""

    levels: tuple[int, int, int, int] = (96, 192, 384, 768)
    """Of the four levels after reassembly, finest first."""
    fusion: int = 256
    last: int = 128


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """A confidence from a raw output x: low + exp(x), at most high."""

    low: float
    high: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a network is built from; the defaults are those of the official MASt3R model."""

    image_size_px: int = 512
    """Long side of the images that it was trained with; 224 stands for squares of that size."""
    patch_px: int = 16
    encoder_width: int = 1024
    encoder_depth: int = 24
    encoder_heads: int = 16
    decoder_width: int = 768
    decoder_depth: int = 12
    decoder_heads: int = 12
    mlp_ratio: float = 4.0
    rope_base: float = 100.0
    head: Head = "catmlp+dpt"
    descriptor_channels: int = 24
    """0 where the network gives none."""
    confidence: Confidence = field(default_factory=lambda: Confidence(low=1.0))
    descriptor_confidence: Confidence = field(default_factory=lambda: Confidence(low=0.0))
    dpt: DptWidths = field(default_factory=DptWidths)

    def __post_init__(self) -> None:
        for name, width, heads in (
            ("encoder", self.encoder_width, self.encoder_heads),
            ("decoder", self.decoder_width, self.decoder_heads),
        ):
            # Rotary positions split a head's channels into halves (rows, columns), and these into pairs.
            if heads < 1 or width < 1 or width % (4 * heads):
                raise WeightsError(f"{name}: {width} channels do not split into {heads} heads of a multiple of four")
        if self.patch_px < 1 or self.encoder_depth < 1 or self.decoder_depth < 1 or self.image_size_px < self.patch_px:
            raise WeightsError("patch size and depths must be positive, and an image no smaller than a patch")
        if self.head != "linear" and (self.patch_px != 16 or self.decoder_depth < 4):
            raise WeightsError("a DPT head needs patches of 16 px and a decoder of at least four blocks")
        if (self.head == "catmlp+dpt") != (self.descriptor_channels > 0):
            raise WeightsError(f"a head of type {self.head} cannot give {self.descriptor_channels}-d descriptors")

    @property
    def dpt_hooks(self) -> tuple[int, int, int, int]:
        """Which outputs the DPT head reads: 0 is the encoder's, i the one after block i of the decoder."""
        depth = self.decoder_depth
        return 0, depth // 2, 3 * depth // 4, depth
