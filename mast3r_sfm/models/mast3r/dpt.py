"""The dense prediction head (DPT, Ranftl et al., arXiv 2103.13413): from tokens of four depths to a map of pixels.

Parameters carry the names of the official checkpoints. Two steps are done in another way than the paper draws them,
with the same result: a 1×1 convolution before its upsampling instead of after it (both are linear, and the weights of
an interpolation sum to one), and, where only some pixels are asked for, the last convolutions at these alone.

Shape letters: B batch, C channels, h w grid of patches of 16 px, H W = 16h 16w pixels, M pixels asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from mast3r_sfm.models.mast3r.architecture import DptWidths

Grid = tuple[int, int]
"""Rows and columns of patches."""


def as_map(tokens: Tensor, grid: Grid) -> Tensor:
    """[B, h·w, C] to [B, C, h, w], without a copy."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def _double(values: Tensor) -> Tensor:
    return functional.interpolate(values, scale_factor=2, mode="bilinear", align_corners=True)


class ResidualConvUnit(nn.Module):
    """Two 3×3 convolutions behind ReLUs, around a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, values: Tensor) -> Tensor:
        """[B, C, rows, columns] to the same."""
        result: Tensor = values + self.conv2(functional.relu(self.conv1(functional.relu(values))))
        return result


class FusionBlock(nn.Module):
    """Adds a level to what came from the coarser ones, and doubles the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(width, width, 1)
        self.resConfUnit1 = ResidualConvUnit(width)
        self.resConfUnit2 = ResidualConvUnit(width)

    def forward(self, level: Tensor, coarser: Tensor | None = None) -> Tensor:
        """[B, C, rows, columns] of the level and of the coarser ones, if any, to [B, C, 2 rows, 2 columns]."""
        fused = level if coarser is None else coarser + self.resConfUnit1(level)
        return _double(self.out_conv(self.resConfUnit2(fused)))


class Scratch(nn.Module):
    """Projection of the levels to one width, and their fusion; named as in the checkpoints."""

    def __init__(self, widths: DptWidths) -> None:
        super().__init__()
        for number, width in enumerate(widths.levels, start=1):
            setattr(self, f"layer{number}_rn", nn.Conv2d(width, widths.fusion, 3, padding=1, bias=False))
        # The checkpoints list these four under a second name.
        self.layer_rn = nn.ModuleList(self.get_submodule(f"layer{number}_rn") for number in range(1, 5))
        for number in range(1, 5):
            setattr(self, f"refinenet{number}", FusionBlock(widths.fusion))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Four levels, finest first, of 4h, 2h, h and h/2 rows (rounded up), to [B, fusion, 8h, 8w]."""
        fused: Tensor | None = None
        for number in range(4, 0, -1):
            level = self.layer_rn[number - 1](levels[number - 1])
            if fused is not None:
                # A grid with an odd side comes back from the coarsest level one too large.
                fused = fused[:, :, : level.shape[2], : level.shape[3]]
            fused = self.get_submodule(f"refinenet{number}")(level, fused)
        assert fused is not None
        return fused


class DptHead(nn.Module):
    """Tokens of the encoder and of three depths of the decoder to a map of pixels."""

    def __init__(self, token_widths: Sequence[int], widths: DptWidths, channels: int) -> None:
        """Make the head.

        Args:
            token_widths: channels of the tokens at the four hooks.
            widths: channels inside.
            channels: of the map.
        """
        super().__init__()
        one, two, three, four = widths.levels
        self.act_postprocess = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(token_widths[0], one, 1), nn.ConvTranspose2d(one, one, 4, stride=4)),
                nn.Sequential(nn.Conv2d(token_widths[1], two, 1), nn.ConvTranspose2d(two, two, 2, stride=2)),
                nn.Sequential(nn.Conv2d(token_widths[2], three, 1)),
                nn.Sequential(nn.Conv2d(token_widths[3], four, 1), nn.Conv2d(four, four, 3, stride=2, padding=1)),
            ]
        )
        self.scratch = Scratch(widths)
        middle = widths.fusion // 2
        self.head = nn.Sequential(
            nn.Conv2d(widths.fusion, middle, 3, padding=1),
            nn.UpsamplingBilinear2d(scale_factor=2),
            nn.Conv2d(middle, widths.last, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(widths.last, channels, 1),
        )

    def features(self, hooks: Sequence[Tensor], grid: Grid) -> Tensor:
        """All that the head does before its last upsampling.

        Args:
            hooks: [B, h·w, C] tokens at the four hooks.
            grid: h and w.

        Returns:
            [B, fusion / 2, 8h, 8w].
        """
        levels = [
            reassemble(as_map(tokens, grid)) for reassemble, tokens in zip(self.act_postprocess, hooks, strict=True)
        ]
        result: Tensor = self.head[0](self.scratch(levels))
        return result

    def dense(self, features: Tensor) -> Tensor:
        """The whole map: [B, fusion / 2, 8h, 8w] to [B, channels, H, W]."""
        result: Tensor = self.head[1:](features)
        return result

    def at(self, features: Tensor, index: Tensor) -> Tensor:
        """The map of one view at some pixels, equal to `dense` there.

        Args:
            features: [fusion / 2, 8h, 8w].
            index: [M] pixels, row · W + column.

        Returns:
            [M, channels].
        """
        convolution, last = self.head[2], self.head[4]
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(last, nn.Conv2d)
        window = _windows(features, index)  # [M, 9, C]
        kernel = convolution.weight.flatten(2).permute(2, 1, 0).flatten(0, 1)  # [9·C, last], in the window's order
        hidden = functional.relu(functional.linear(window.flatten(1), kernel.T, convolution.bias))
        return functional.linear(hidden, last.weight.flatten(1), last.bias)


def _windows(features: Tensor, index: Tensor) -> Tensor:
    """Pixels of the doubled map in the 3×3 windows around some of them, zero beyond the border.

    Args:
        features: [C, rows, columns] before they are doubled (bilinear, corner to corner).
        index: [M] pixels of the doubled map.

    Returns:
        [M, 9, C], windows row by row.
    """
    channels, rows, columns = features.shape
    steps = torch.arange(-1, 2, device=index.device)
    row = (index // (2 * columns))[:, None] + steps  # [M, 3]
    column = (index % (2 * columns))[:, None] + steps
    weight, source = zip(_taps(row, rows), _taps(column, columns), strict=True)
    flat = features.flatten(1).T  # [rows · columns, C]
    total = flat.new_zeros((len(index), 9, channels))
    for vertical in range(2):
        for horizontal in range(2):
            place = source[0][vertical][:, :, None] * columns + source[1][horizontal][:, None, :]  # [M, 3, 3]
            share = weight[0][vertical][:, :, None] * weight[1][horizontal][:, None, :]
            total += flat[place.flatten(1)] * share.flatten(1)[:, :, None]
    return total


def _taps(place: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Where a doubled axis reads the axis it was made from: two weights and two sources of each place [M, 3]."""
    inside = (place >= 0) & (place < 2 * size)
    exact = place.clamp(0, 2 * size - 1) * ((size - 1) / (2 * size - 1))
    low = exact.floor().clamp(max=max(size - 2, 0))
    upper = exact - low
    source = low.long()
    return ((1 - upper) * inside, upper * inside), (source, (source + 1).clamp(max=size - 1))
