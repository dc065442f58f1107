"""A picture of the pairs stage: the similarity matrix, and the graph of the pairs beside it."""

from __future__ import annotations

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.sparse.csgraph import dijkstra

from mast3r_sfm.retrieval.stage import KINDS, ChosenPairs
from mast3r_sfm.types import Float32, Float64, Reason, ViewGraph

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PANEL_PX = 900
_MARGIN_PX = 40
_SMOOTH = 2
"""The graph is drawn so many times as large and shrunk, which makes its lines smooth."""
_LANDMARKS = 200
_SHADES = np.array([(12, 7, 40), (84, 15, 109), (187, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)
_COLOURS: dict[Reason, tuple[int, int, int]] = {
    Reason.KEYFRAME: (31, 119, 180),
    Reason.NEAREST: (23, 190, 207),
    Reason.NEIGHBOUR: (120, 120, 120),
    Reason.BRIDGE: (214, 39, 40),
    Reason.USER: (148, 103, 189),
    Reason.EXHAUSTIVE: (150, 150, 150),
    Reason.SEQUENCE: (44, 160, 44),
    Reason.GPS: (188, 149, 34),
}


def draw_pairs(chosen: ChosenPairs) -> Image.Image:
    """Both panels side by side, images in the order of their names, with a legend of the kinds of pairs."""
    canvas = Image.new("RGB", (2 * PANEL_PX + 3 * _MARGIN_PX, PANEL_PX + 3 * _MARGIN_PX), "white")
    canvas.paste(_matrix(chosen.similarity), (_MARGIN_PX, _MARGIN_PX))
    canvas.paste(_graph(chosen.graph), (2 * _MARGIN_PX + PANEL_PX, _MARGIN_PX))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    draw.text((_MARGIN_PX, 10), f"similarity of {chosen.graph.num_images:,} photos", "black", font)
    draw.text((2 * _MARGIN_PX + PANEL_PX, 10), f"{len(chosen.graph.pairs):,} pairs to match", "black", font)
    _draw_legend(draw, chosen.graph, font)
    return canvas


def layout(graph: ViewGraph) -> Float64:
    """Places of the images [N, 2] in [0, 1] that reflect how many pairs lie between them.

    Multidimensional scaling of the distances along the graph to some landmarks (de Silva and Tenenbaum, "Sparse
    multidimensional scaling using landmark points", 2004).
    """
    count = graph.num_images
    if count < 3:
        return np.linspace(0.25, 0.75, count)[:, None] * np.ones(2)
    ones = np.ones(len(graph.pairs))
    links = scipy.sparse.coo_array((ones, tuple(graph.pairs.T)), shape=(count, count)).tocsr()
    landmarks = np.unique(np.linspace(0, count - 1, min(count, _LANDMARKS)).astype(np.int64))
    distance = dijkstra(links, directed=False, unweighted=True, indices=landmarks)
    reached = np.isfinite(distance)
    distance = np.where(reached, distance, 2 * distance[reached].max(initial=1.0)) ** 2
    among = distance[:, landmarks]
    mean = among.mean(axis=0)
    centred = -0.5 * (among - mean - among.mean(axis=1, keepdims=True) + among.mean())
    variance, direction = np.linalg.eigh(centred)
    strength = np.sqrt(np.maximum(variance[-2:], 1e-12))
    places = -0.5 * (distance - mean[:, None]).T @ (direction[:, -2:] / strength)
    places += 0.02 * np.ptp(places, axis=0).max() * _spread(count)  # images with the same pairs would hide each other
    low, size = places.min(axis=0), max(float(np.ptp(places, axis=0).max()), 1e-9)
    return np.asarray((places - low - np.ptp(places, axis=0) / 2) / size + 0.5)


def _spread(count: int) -> Float64:
    """Evenly spread directions [N, 2], another for every image."""
    angle = np.arange(count) * np.pi * (3 - np.sqrt(5))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _matrix(similarity: Float32) -> Image.Image:
    """Shades on a scale of roots, since most similarities are small; of many images, blocks show their largest."""
    count = len(similarity)
    step = max(-(-count // PANEL_PX), 1)
    starts = np.arange(0, count, step)
    values = similarity.astype(np.float64)
    np.fill_diagonal(values, 0.0)
    values = np.maximum.reduceat(np.maximum.reduceat(values, starts, axis=0), starts, axis=1)
    values = np.sqrt(values / max(float(values.max(initial=0.0)), 1e-9))
    place = values * (len(_SHADES) - 1)
    shades = [np.interp(place, np.arange(len(_SHADES)), channel) for channel in _SHADES.T]
    pixels: NDArray[np.uint8] = np.stack(shades, axis=-1).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((PANEL_PX, PANEL_PX), Image.Resampling.NEAREST)


def _graph(graph: ViewGraph) -> Image.Image:
    side = _SMOOTH * PANEL_PX
    panel = Image.new("RGB", (side, side), (250, 250, 250))
    draw = ImageDraw.Draw(panel)
    places = (0.04 + 0.92 * layout(graph)) * side
    width = 3 if len(graph.pairs) < 5_000 else 1
    # Bridges last, so that nothing hides them.
    for kind in sorted(_COLOURS, key=lambda kind: (kind is Reason.BRIDGE, -kind)):
        for first, second in places[graph.pairs[graph.reason == kind]]:
            draw.line([tuple(first), tuple(second)], _COLOURS[kind], 3 * width if kind is Reason.BRIDGE else width)
    radius = 9 if graph.num_images < 500 else 4
    for x, y in places:
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill="black")
    return panel.resize((PANEL_PX, PANEL_PX), Image.Resampling.LANCZOS)


def _draw_legend(
    draw: ImageDraw.ImageDraw, graph: ViewGraph, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    x, y = 2.0 * _MARGIN_PX + PANEL_PX, 1.4 * _MARGIN_PX + PANEL_PX
    for kind, colour in _COLOURS.items():
        number = int((graph.reason == kind).sum())
        if number:
            text = f"{number:,} {KINDS[kind]}"
            if x + 40 + draw.textlength(text, font) > 3 * _MARGIN_PX + 2 * PANEL_PX:
                x, y = 2.0 * _MARGIN_PX + PANEL_PX, y + 26
            draw.line([(x, y + 10), (x + 24, y + 10)], colour, 4)
            draw.text((x + 32, y), text, "black", font)
            x += 60 + draw.textlength(text, font)
