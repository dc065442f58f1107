"""The blocks of the vision transformer, with rotary positions in two dimensions.

CroCo v2 (arXiv 2211.10408), RoPE (arXiv 2104.09864). Parameters carry the names of the official checkpoints.

Shape letters: B batch, T and S tokens, C channels, h w grid of patches. The residual stream is float32; the linear
layers compute in whatever type their weights have, which is how half precision is chosen (see `network`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine [T, 2, D/4] of a grid's tokens, for heads of D channels: by row, then by column."""


def rotation_table(rows: int, columns: int, head_width: int, base: float, device: torch.device) -> Rotation:
    """Angles of rotary positions for the tokens of a grid, in row-major order.

    The channels of a head are split in halves, the first turned by the token's row, the second by its column; in a half
    of width D, pair i turns by position · base^(-2i/D).
    """
    half = head_width // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    frequencies = 1.0 / base**exponents  # [D/4]
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    angles = torch.stack([row, column], dim=1)[:, :, None] * frequencies  # [T, 2, D/4]
    return angles.cos(), angles.sin()


def rotate(values: Tensor, rotation: Rotation) -> Tensor:
    """Turn queries or keys [B, heads, T, D]: in each half, channel c together with channel c + D/4."""
    cosine, sine = rotation
    # [B, heads, T, half, partner, frequency]; the angles need float32 even where the channels are half precision.
    one, other = values.reshape(*values.shape[:-1], 2, 2, -1).unbind(dim=-2)
    turned = torch.stack([one * cosine - other * sine, other * cosine + one * sine], dim=-2)
    return turned.flatten(-3).to(values.dtype)


def _split_heads(values: Tensor, heads: int) -> Tensor:
    """[B, T, C] to [B, heads, T, C / heads]."""
    return values.reshape(*values.shape[:-1], heads, -1).transpose(1, 2)


def _join_heads(values: Tensor) -> Tensor:
    return values.transpose(1, 2).flatten(2)


class Linear(nn.Linear):
    """A linear layer that computes in the type of its weights, whatever type it is given."""

    def pack(self) -> None:
        """Keep the weights as oneDNN wants them, for inference on a CPU; they cannot be saved or moved any more."""
        self.weight, self.bias = (
            nn.Parameter(value.detach().to_mkldnn(), requires_grad=False) for value in (self.weight, self.bias)
        )

    def forward(self, values: Tensor) -> Tensor:
        """[..., C] to [..., out]."""
        if self.weight.is_mkldnn:
            return functional.linear(values.float().contiguous().to_mkldnn(), self.weight, self.bias).to_dense()
        return functional.linear(values.to(self.weight.dtype), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm with the epsilon of the official models."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=LAYER_NORM_EPS)


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, tokens: Tensor, rotation: Rotation) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        qkv = self.qkv(tokens)
        query, key, value = (_split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(rotate(query, rotation), rotate(key, rotation), value)
        result: Tensor = self.proj(_join_heads(mixed))
        return result


class CrossAttention(nn.Module):
    """Attention of one view's tokens to the other's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projq = Linear(width, width)
        self.projk = Linear(width, width)
        self.projv = Linear(width, width)
        self.proj = Linear(width, width)

    def forward(self, tokens: Tensor, other: Tensor, rotation: Rotation, other_rotation: Rotation) -> Tensor:
        """[B, T, C], asking [B, S, C], to [B, T, C]."""
        query = rotate(_split_heads(self.projq(tokens), self.heads), rotation)
        key = rotate(_split_heads(self.projk(other), self.heads), other_rotation)
        value = _split_heads(self.projv(other), self.heads)
        result: Tensor = self.proj(_join_heads(functional.scaled_dot_product_attention(query, key, value)))
        return result


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, out)

    def forward(self, values: Tensor) -> Tensor:
        """[..., width] to [..., out]."""
        result: Tensor = self.fc2(functional.gelu(self.fc1(values)))
        return result


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each behind a norm and around a residual."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, round(width * mlp_ratio), width)

    def forward(self, tokens: Tensor, rotation: Rotation) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        tokens = tokens + self.attn(self.norm1(tokens), rotation)
        result: Tensor = tokens + self.mlp(self.norm2(tokens))
        return result


class DecoderBlock(nn.Module):
    """Self-attention, attention to the other view, MLP, each behind a norm and around a residual."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = LayerNorm(width)
        self.norm3 = LayerNorm(width)
        self.mlp = Mlp(width, round(width * mlp_ratio), width)
        self.norm_y = LayerNorm(width)

    def forward(self, tokens: Tensor, other: Tensor, rotation: Rotation, other_rotation: Rotation) -> Tensor:
        """[B, T, C], with the other view's [B, S, C] from the layer before, to [B, T, C]."""
        tokens = tokens + self.attn(self.norm1(tokens), rotation)
        tokens = tokens + self.cross_attn(self.norm2(tokens), self.norm_y(other), rotation, other_rotation)
        result: Tensor = tokens + self.mlp(self.norm3(tokens))
        return result
