"""Procedural surface colour: defined everywhere on a surface, never repeating, from coarse to fine.

Colour is a function of surface coordinates in world units, so that all views see the same surface. What is finer than
a pixel's footprint is faded out, as an ideal lens and sensor would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
UInt32 = NDArray[np.uint32]

Pattern = Literal["plain", "brick", "tiles", "planks"]

_NOISE_SIZES = (1.7, 0.83, 0.41, 0.2, 0.1, 0.05, 0.025, 0.0125)
"""Lattice spacing of the octaves of value noise, in world units; no two share lattice points."""
_MARK_SIZES = (0.94, 0.43, 0.19, 0.085)
"""Cell sizes of the layers of marks, in world units."""
_UNIT_SHAPE = {"brick": (0.42, 0.14), "tiles": (0.5, 0.5), "planks": (1.6, 0.17)}
"""Width and height of a brick, a tile, a plank in world units."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """How a surface looks."""

    seed: int
    colour: tuple[float, float, float]
    """Mean RGB in [0, 1]."""
    pattern: Pattern = "plain"
    contrast: float = 0.9
    """Strength of the noise; 0 = one flat colour."""
    marks: float = 0.35
    """Share of the cells of each layer that carry a mark: blob, bar, ring or letter-like sign."""


def surface_colour(material: Material, uv: Float32, face: UInt32, footprint: Float32) -> Float32:
    """Evaluate the colour of points of a surface.

    Args:
        material: the look.
        uv: [K, 2] surface coordinates in world units.
        face: [K] which face of the body; faces look different.
        footprint: [K] size in world units that a pixel covers there.

    Returns:
        [K, 3] linear RGB, about 0–1.
    """
    seed = (face + np.uint32(1)) * np.uint32(0x01000193) + np.uint32(material.seed)
    tone = _noise_octaves(uv, seed, footprint)
    tint = np.stack([_value_noise(uv / np.float32(1.3), seed + np.uint32(90 + c)) for c in range(3)], axis=-1)
    base = np.asarray(material.colour, dtype=np.float32) * (1 + np.float32(0.16 * material.contrast) * tint)
    colour: Float32 = base * np.exp2(np.float32(material.contrast) * tone)[:, None]
    if material.pattern != "plain":
        colour = _lay_units(colour, material.pattern, uv, seed, footprint)
    for layer, size in enumerate(_MARK_SIZES if material.marks > 0 else ()):
        colour = _add_marks(colour, material.marks, uv, seed + np.uint32(200 + layer), size, footprint)
    return colour


def _hash(x: NDArray[np.int32], y: NDArray[np.int32], seed: UInt32) -> UInt32:
    """Mix lattice coordinates and a seed into 32 random bits (the finaliser of MurmurHash3)."""
    mixed = x.astype(np.uint32) * np.uint32(0x9E3779B1) + seed
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA6B) + y.astype(np.uint32) * np.uint32(0xC2B2AE35)
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> np.uint32(16))


def _unit(bits: UInt32) -> Float32:
    """Bits as numbers in [0, 1)."""
    number: Float32 = (bits >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)
    return number


def _draw(cell: NDArray[np.int32], seed: UInt32, salt: int) -> Float32:
    """One random number in [0, 1) for each cell [K, 2]."""
    return _unit(_hash(cell[:, 0], cell[:, 1], seed + np.uint32(salt * 7919)))


def _value_noise(uv: Float32, seed: UInt32) -> Float32:
    """Smooth noise in [-1, 1] with one random value at each integer point."""
    corner = np.floor(uv)
    x, y = (uv - corner).T
    x, y = x * x * (3 - 2 * x), y * y * (3 - 2 * y)
    i, j = corner.astype(np.int32).T
    top = _unit(_hash(i, j, seed)) * (1 - x) + _unit(_hash(i + 1, j, seed)) * x
    low = _unit(_hash(i, j + 1, seed)) * (1 - x) + _unit(_hash(i + 1, j + 1, seed)) * x
    noise: Float32 = 2 * (top * (1 - y) + low * y) - 1
    return noise


def _fade(size: float, footprint: Float32) -> Float32:
    """Weight of structure of a size: 1 where pixels are much finer, 0 where they cannot resolve it."""
    weight: Float32 = np.clip(size / (2 * footprint) - 1, 0, 1).astype(np.float32)
    return weight


def _noise_octaves(uv: Float32, seed: UInt32, footprint: Float32) -> Float32:
    total = np.zeros(len(uv), dtype=np.float32)
    for octave, size in enumerate(_NOISE_SIZES):
        weight = np.float32(0.5 * 0.87**octave) * _fade(size, footprint)
        if weight.any():
            total += weight * _value_noise(uv / np.float32(size), seed + np.uint32(octave))
    return total


def _lay_units(colour: Float32, pattern: Pattern, uv: Float32, seed: UInt32, footprint: Float32) -> Float32:
    """Bricks, tiles or planks: each with a tone of its own, and joints between them."""
    width, height = _UNIT_SHAPE[pattern]
    row = np.floor(uv[:, 1] / height)
    if pattern == "tiles":
        shift = np.zeros_like(row)
    else:
        rows = np.stack([row, row], axis=-1).astype(np.int32)
        shift = _draw(rows, seed, 1) if pattern == "planks" else (row % 2) / 2
    column = np.floor(uv[:, 0] / width + shift)
    cell = np.stack([column, row], axis=-1).astype(np.int32)
    tone = 0.75 + 0.5 * _draw(cell, seed, 2)
    inside = np.minimum(
        np.minimum(uv[:, 0] / width + shift - column, column + 1 - uv[:, 0] / width - shift) * width,
        np.minimum(uv[:, 1] / height - row, row + 1 - uv[:, 1] / height) * height,
    )
    joint = 0.006 if pattern == "planks" else 0.01
    # Where a joint is far thinner than a pixel, it is left out.
    sharp = _fade(16 * joint, footprint)
    cover = 1 - sharp * (1 - np.clip((inside - joint) / footprint + 0.5, 0, 1))
    shade = cover * tone + (1 - cover) * np.float32(0.55)
    laid: Float32 = colour * shade[:, None]
    return laid


def _add_marks(colour: Float32, share: float, uv: Float32, seed: UInt32, size: float, footprint: Float32) -> Float32:
    """Paint at most one mark into each cell of a rotated grid, wholly inside its cell."""
    # A fixed turn per layer keeps the grids of the layers from lining up with the body or with each other.
    angle = 0.4 + 7.3 * size
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=np.float32)
    scaled = uv @ turn / np.float32(size)
    cell = np.floor(scaled).astype(np.int32)
    chosen = np.flatnonzero((_draw(cell, seed, 3) < share) & (_fade(size, footprint) > 0))
    if len(chosen) == 0:
        return colour
    cell, seed, scaled = cell[chosen], seed[chosen], scaled[chosen]
    radius = 0.2 + 0.15 * _draw(cell, seed, 4)
    centre = np.stack([_draw(cell, seed, 5), _draw(cell, seed, 6)], axis=-1)
    local = scaled - cell - (0.5 + (centre - 0.5) * (1 - 2.83 * radius)[:, None])
    sine, cosine = np.sin(6.283 * _draw(cell, seed, 7)), np.cos(6.283 * _draw(cell, seed, 7))
    x = (local[:, 0] * cosine - local[:, 1] * sine) / radius
    y = (local[:, 0] * sine + local[:, 1] * cosine) / radius
    distance = _distance_inside(x, y, cell, seed) * radius * np.float32(size)
    alpha = np.clip(distance / footprint[chosen] + 0.5, 0, 1) * (0.55 + 0.45 * _draw(cell, seed, 8))
    alpha *= _fade(size, footprint[chosen])
    paint = np.stack([_draw(cell, seed, 10 + c) for c in range(3)], axis=-1)
    # Dark or light, rarely in between: marks are to stand out from any ground.
    level = np.where(_draw(cell, seed, 9) < 0.5, np.float32(0.18), np.float32(1.25))
    mean = colour[chosen].mean(axis=-1) * level
    target = mean[:, None] * (0.55 + 0.9 * paint)
    result = colour.copy()
    result[chosen] += alpha[:, None] * (target - result[chosen])
    return result


def _distance_inside(x: Float32, y: Float32, cell: NDArray[np.int32], seed: UInt32) -> Float32:
    """How far a point lies inside the mark of its cell, in mark radii; negative outside."""
    across = np.abs(x)
    along = np.abs(y)
    aspect = 0.25 + 0.7 * _draw(cell, seed, 14)
    blob = 0.95 - np.hypot(x, y / aspect)
    bar = np.minimum(0.75 - across, 0.75 * aspect - along)
    ring = 0.18 - np.abs(np.hypot(x, y) - 0.75)
    column, row = np.floor((x + 0.6) * 2.5).astype(np.int32), np.floor((y + 0.8) * 3.125).astype(np.int32)
    in_sign = (column >= 0) & (column < 3) & (row >= 0) & (row < 5)
    inked = _unit(_hash(column, row, _hash(cell[:, 0], cell[:, 1], seed))) < 0.6
    sign = np.where(in_sign & inked, np.float32(0.3), np.float32(-0.3))
    kind = (4 * _draw(cell, seed, 15)).astype(np.int32)
    return np.choose(kind, [blob, bar, np.maximum(ring, 0.3 - np.hypot(x, y)), sign]).astype(np.float32)
