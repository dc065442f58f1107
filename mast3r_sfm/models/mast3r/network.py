"""The MASt3R and DUSt3R networks: encoder, two decoders that look at each other, heads.

MASt3R (arXiv 2406.09756), DUSt3R (arXiv 2312.14132). Encoding an image and decoding a pair are separate calls, so that
an image is encoded once however many pairs it is in, and both orders of a pair are decoded from the same tokens.

Shape letters: B batch, T tokens, C channels, h w grid of patches, H W pixels, D descriptor, M pixels asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from mast3r_sfm.errors import ShapeError, WeightsError
from mast3r_sfm.models.mast3r.architecture import Architecture
from mast3r_sfm.models.mast3r.dpt import DptHead, Grid, as_map
from mast3r_sfm.models.mast3r.transformer import (
    DecoderBlock,
    EncoderBlock,
    LayerNorm,
    Linear,
    Mlp,
    Rotation,
    rotation_table,
)

POINT_CHANNELS = 4
"""x, y, z and a confidence."""


class Points(NamedTuple):
    """Points in the first view's camera frame, and how sure the network is of them."""

    xyz: Tensor
    """[..., 3]."""
    confidence: Tensor
    """[...]."""


class Descriptors(NamedTuple):
    """Local features of every pixel."""

    values: Tensor
    """[B, H, W, D], of unit length."""
    confidence: Tensor
    """[B, H, W]."""


class PatchEmbedding(nn.Module):
    """Patches of an image to tokens."""

    def __init__(self, patch_px: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_px, stride=patch_px)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to [B, h·w, C], row by row."""
        result: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return result


class Head(nn.Module):
    """What turns a view's tokens into points and descriptors; computes in float32."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self._architecture = architecture
        encoder, decoder = architecture.encoder_width, architecture.decoder_width
        if architecture.head == "linear":
            self.proj = Linear(decoder, POINT_CHANNELS * architecture.patch_px**2)
        else:
            self.dpt = DptHead((encoder, decoder, decoder, decoder), architecture.dpt, POINT_CHANNELS)
        if architecture.descriptor_channels:
            width = encoder + decoder
            channels = architecture.descriptor_channels + 1
            hidden = round(architecture.mlp_ratio * width)
            self.head_local_features = Mlp(width, hidden, channels * architecture.patch_px**2)

    @property
    def hooks(self) -> tuple[int, ...]:
        """Which of the outputs of `Network.decode` the head reads, in the order in which it wants them."""
        return (
            (self._architecture.decoder_depth,) if self._architecture.head == "linear" else self._architecture.dpt_hooks
        )

    def features(self, outputs: Sequence[Tensor], grid: Grid) -> Tensor:
        """What points are read from, by `points` or by `points_at`.

        Args:
            outputs: [B, h·w, C] tokens at the hooks.
            grid: h and w.

        Returns:
            [B, C, rows, columns], half as large as the image for a DPT head, as large for a linear one.
        """
        if self._architecture.head == "linear":
            return self._unpatch(self.proj(outputs[-1]), grid)
        return self.dpt.features(outputs, grid)

    def points(self, features: Tensor) -> Points:
        """Of every pixel: [B, C, rows, columns] to [B, H, W, 3] and [B, H, W]."""
        raw = features if self._architecture.head == "linear" else self.dpt.dense(features)
        return self._to_points(raw.permute(0, 2, 3, 1))

    def points_at(self, features: Tensor, index: Tensor) -> Points:
        """Of some pixels of one view: [C, rows, columns] and [M] indices row · W + column, to [M, 3] and [M]."""
        if self._architecture.head == "linear":
            return self._to_points(features.flatten(1).T[index])
        return self._to_points(self.dpt.at(features, index))

    def descriptors(self, outputs: Sequence[Tensor], grid: Grid) -> Descriptors:
        """Of every pixel, from the tokens [B, h·w, C] at the hooks: the encoder's and the last ones."""
        both = torch.cat([outputs[0], outputs[-1]], dim=-1)
        values = self._unpatch(self.head_local_features(both), grid).permute(0, 2, 3, 1)
        confidence = self._architecture.descriptor_confidence
        return Descriptors(
            values=functional.normalize(values[..., :-1], dim=-1),
            confidence=_confidence(values[..., -1], confidence.low, confidence.high),
        )

    def _unpatch(self, values: Tensor, grid: Grid) -> Tensor:
        """[B, h·w, C · patch²] to [B, C, H, W]."""
        return functional.pixel_shuffle(as_map(values, grid), self._architecture.patch_px)

    def _to_points(self, raw: Tensor) -> Points:
        """[..., 4] raw outputs: a point lies expm1(d) away, where d is how far the raw one does."""
        distance = raw[..., :3].norm(dim=-1, keepdim=True)
        direction = raw[..., :3] / distance.clamp(min=torch.finfo(raw.dtype).tiny)
        confidence = self._architecture.confidence
        return Points(
            xyz=direction * torch.expm1(distance), confidence=_confidence(raw[..., 3], confidence.low, confidence.high)
        )


def _confidence(raw: Tensor, low: float, high: float) -> Tensor:
    return (low + raw.exp()).clamp(max=high)


class Network(nn.Module):
    """A MASt3R or DUSt3R network."""

    def __init__(self, architecture: Architecture) -> None:
        """Make the network; its parameters are random until a checkpoint's are loaded."""
        super().__init__()
        self.architecture = architecture
        encoder, decoder = architecture.encoder_width, architecture.decoder_width
        # Only used in pre-training, but every checkpoint has it.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder))
        self.patch_embed = PatchEmbedding(architecture.patch_px, encoder)
        self.enc_blocks = nn.ModuleList(
            EncoderBlock(encoder, architecture.encoder_heads, architecture.mlp_ratio)
            for _ in range(architecture.encoder_depth)
        )
        self.enc_norm = LayerNorm(encoder)
        self.decoder_embed = Linear(encoder, decoder)
        self.dec_blocks, self.dec_blocks2 = (
            nn.ModuleList(
                DecoderBlock(decoder, architecture.decoder_heads, architecture.mlp_ratio)
                for _ in range(architecture.decoder_depth)
            )
            for _ in range(2)
        )
        self.dec_norm = LayerNorm(decoder)
        self.downstream_head1 = Head(architecture)
        self.downstream_head2 = Head(architecture)

    @property
    def heads(self) -> tuple[Head, Head]:
        """Of the first and of the second view."""
        return self.downstream_head1, self.downstream_head2

    def decoder_to(self, dtype: torch.dtype) -> None:
        """Let the decoder's blocks compute in `dtype`; everything else, its norms and residuals too, stays in float32.

        The encoder runs once per image and its tokens are what all pairs of the image rest on, while the decoder runs
        for every pair: half precision there gives most of the speed for a fraction of the error.
        """
        for blocks in (self.dec_blocks, self.dec_blocks2):
            for layer in blocks.modules():
                if isinstance(layer, Linear):
                    layer.to(dtype)

    def pack_for_cpu(self) -> None:
        """Let oneDNN compute the float32 products, which torch otherwise leaves to MKL.

        On AMD processors with AVX-512 this is twice as fast; with half precision, torch does it by itself.
        """
        for layer in self.modules():
            if isinstance(layer, Linear) and layer.weight.dtype == torch.float32:
                layer.pack()

    def compile_blocks(self) -> None:
        """Let torch.compile fuse the operations inside each block, at its first use."""
        for blocks in (self.enc_blocks, self.dec_blocks, self.dec_blocks2):
            for block in blocks:
                block.compile(dynamic=True)

    def encode(self, images: Tensor) -> Tensor:
        """Tokens of images.

        Args:
            images: [B, 3, H, W] in [-1, 1], sides multiples of the patch.

        Returns:
            [B, h·w, C] float32, row by row.

        Raises:
            ShapeError: a side is no multiple of the patch.
        """
        patch = self.architecture.patch_px
        height, width = images.shape[2:]
        if height % patch or width % patch or not height or not width:
            raise ShapeError(f"an image of {width}×{height} px: sides must be multiples of {patch} px")
        rotation = self._rotation((height // patch, width // patch), decoder=False, device=images.device)
        tokens = self.patch_embed(images)
        for block in self.enc_blocks:
            tokens = block(tokens, rotation)
        result: Tensor = self.enc_norm(tokens)
        return result

    def decode(self, first: Tensor, second: Tensor, grids: tuple[Grid, Grid]) -> tuple[list[Tensor], list[Tensor]]:
        """Let the tokens of two views look at each other; the first is the reference frame.

        Args:
            first: [B, h·w, C] tokens of the encoder.
            second: the same of the second view, whose grid may be another.
            grids: h and w of both.

        Returns:
            for each view, [B, h·w, C] float32: what came in, and the output of each block, the last one normalised.
        """
        turns = [self._rotation(grid, decoder=True, device=first.device) for grid in grids]
        views = [self.decoder_embed(tokens).float() for tokens in (first, second)]
        outputs: tuple[list[Tensor], list[Tensor]] = ([first], [second])
        for one, two in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            views = [one(views[0], views[1], turns[0], turns[1]), two(views[1], views[0], turns[1], turns[0])]
            for stored, view in zip(outputs, views, strict=True):
                stored.append(view)
        for stored in outputs:
            stored[-1] = self.dec_norm(stored[-1])
        return outputs

    def _rotation(self, grid: Grid, *, decoder: bool, device: torch.device) -> Rotation:
        architecture = self.architecture
        head_width = (
            architecture.decoder_width // architecture.decoder_heads
            if decoder
            else architecture.encoder_width // architecture.encoder_heads
        )
        return rotation_table(*grid, head_width, architecture.rope_base, device)


def check_tensors(architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes of a checkpoint's tensors with those of the network it should fill.

    Raises:
        WeightsError: some are missing, unknown or of another shape; they are named.
    """
    with torch.device("meta"):
        expected = Network(architecture).state_dict()
    problems = []
    for what, names in (
        ("missing", expected.keys() - tensors.keys()),
        ("unknown", tensors.keys() - expected.keys()),
        (
            "of another shape",
            {name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape},
        ),
    ):
        if names:
            shown = sorted(names)[:8]
            problems.append(f"{len(names)} tensors are {what}: {', '.join(shown)}{', …' if len(names) > 8 else ''}")
    if problems:
        raise WeightsError("the weights do not fit the network that their configuration states; " + "; ".join(problems))


def build_network(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Network:
    """A network with the weights of a checkpoint, which are taken over without a copy; for inference.

    Raises:
        WeightsError: they do not fit.
    """
    check_tensors(architecture, tensors)
    with torch.device("meta"):
        network = Network(architecture)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False)
