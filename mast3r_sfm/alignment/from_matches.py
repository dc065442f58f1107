"""The alignment problem of one part of the collection, from the matches of a model that brings its own depth.

Whole pointmaps never leave the predictor, so canonical views are made of what the pairs say at their matches: scales of
the pairs from the depths that they give the same grid cells, an anchor for every cell that was matched, with the median
of its depths, and each match as a depth relative to that. Before that, the pairs agree on the depth of every region of
an image: their errors in depth change slowly from place to place, but each pair has its own, and no anchor can be
right for two pairs that are wrong by different amounts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mast3r_sfm.alignment.canonical import GRID_PX
from mast3r_sfm.alignment.edges import components
from mast3r_sfm.alignment.positions import Ratios, average_scales, ratios_of_image
from mast3r_sfm.alignment.problem import PointmapProblem
from mast3r_sfm.colmap.lens import straighten_matches
from mast3r_sfm.types import Bool, Float64, Int32, Int64, PairMatches, Rig

MAX_MATCHES = 2000
"""Of a pair, evenly picked: more make it slower rather than better."""
MAX_TOTAL = 4_000_000
"""Of a part, so that it stays below 6 GB; a pair gets FEW_MATCHES at least."""
FEW_MATCHES = 100
REGION_CELLS = 3
"""Side, in grid cells, of the regions in which the depths of a pair are taken to be wrong by one factor."""
AGREEMENT_ROUNDS = 3
_NEAREST = 1e-9


def problem_from_matches(
    matches: Sequence[PairMatches], images: Int32, rig: Rig, pixel_scale: float
) -> tuple[PointmapProblem, Bool] | None:
    """The alignment problem of some images, and which pairs [E] are in it: those whose scales compare.

    Scales of pairs compare by the places that they share in an image. Where pairs that do so do not connect all images,
    there is no problem to be stated, and the result is None.

    Args:
        matches: verified pairs among the images, with depth, that connect them.
        images: [n] ascending.
        rig: cameras in photo pixels; focal lengths that are not known are not looked at.
        pixel_scale: photo pixels per pixel of what the model saw, in which the problem is stated.
    """
    matches, rig = straighten_matches(matches, rig)
    most = min(MAX_MATCHES, max(FEW_MATCHES, MAX_TOTAL // max(len(matches), 1)))
    counts = np.array([min(len(match), most) for match in matches])
    image = np.searchsorted(images, [(match.first, match.second) for match in matches]).reshape(-1, 2)
    said = _collect(matches, image, counts, pixel_scale)
    scales, group = average_scales(_ratios(said), len(matches))
    comparable = group == np.bincount(group).argmax()
    if len(components(len(images), image[comparable].astype(np.int32))) > 1:
        return None
    depth = _agreed(said, said.depth * scales[said.edge][:, None])
    used = comparable[said.edge]
    number, log_depth = _medians(said.cell[used].ravel(), np.log(depth[used].ravel()))
    anchor = np.minimum(np.searchsorted(number, said.cell), len(number) - 1)
    camera = rig.camera_of_image[images]
    pixels = (
        said.xy / pixel_scale - np.array([rig.cameras[one].params[-2:] for one in camera])[said.image] / pixel_scale
    )
    cameras, local = np.unique(camera, return_inverse=True)
    problem = PointmapProblem(
        base_focal_px=_focal_lengths(said.image.ravel(), np.linalg.norm(pixels, axis=-1).ravel(), said.slope.ravel()),
        camera_of_image=local.astype(np.int32),
        known_focal_px=np.array([_known_focal(rig, int(one)) / pixel_scale for one in cameras]),
        image_of_anchor=number // said.cells_per_image,
        anchor_depth=np.exp(log_depth),
        pairs=image.astype(np.int32),
        start=np.concatenate([[0], np.cumsum(counts)]),
        pixels=pixels,
        anchor=anchor,
        offset=depth / np.exp(log_depth)[anchor],
        weight=said.confidence / max(float(said.confidence.mean()), 1e-300),
        place_error_px=1.0,
    )
    return problem.with_edges(comparable), comparable


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What all pairs say at their M matches, by match and side."""

    edge: Int64
    """[M]."""
    image: Int64
    """[M, 2]."""
    xy: Float64
    """[M, 2, 2] photo pixels."""
    cell: Int64
    """[M, 2] grid cell, numbered over all images."""
    cells_per_image: int
    region: Int64
    """[M, 2] region of the image, numbered over all images."""
    depth: Float64
    """[M, 2] positive, in the scale of the pair."""
    slope: Float64
    """[M, 2] of the ray: distance from the axis over depth."""
    confidence: Float64
    """[M]."""


def _collect(matches: Sequence[PairMatches], image: Int64, counts: Int64, pixel_scale: float) -> _Said:
    some = [np.linspace(0, len(match) - 1, count).astype(int) for match, count in zip(matches, counts, strict=True)]
    xy, points = (
        np.stack(
            [_pick([getattr(match, name + side) for match in matches], some) for side in ("first", "second")], axis=1
        )
        for name in ("xy_", "points_")
    )
    place = np.floor(xy / (GRID_PX * pixel_scale)).astype(np.int64)
    columns, rows = (place.max(axis=(0, 1)) + 1).tolist()
    side = np.repeat(image, counts, axis=0)
    depth = np.maximum(points[..., 2], _NEAREST)
    return _Said(
        edge=np.repeat(np.arange(len(matches)), counts),
        image=side,
        xy=xy,
        cell=(side * rows + place[..., 1]) * columns + place[..., 0],
        cells_per_image=rows * columns,
        region=(side * rows + place[..., 1] // REGION_CELLS) * columns + place[..., 0] // REGION_CELLS,
        depth=depth,
        slope=np.linalg.norm(points[..., :2], axis=-1) / depth,
        confidence=_pick([match.confidence.astype(np.float64) for match in matches], some),
    )


def _pick(arrays: Sequence[Float64], some: Sequence[Int64]) -> Float64:
    return np.concatenate([array[rows] for array, rows in zip(arrays, some, strict=True)])


def _known_focal(rig: Rig, camera: int) -> float:
    return float(rig.cameras[camera].params[0]) if rig.cameras[camera].focal_is_known else np.nan


def _ratios(said: _Said) -> Ratios:
    """Ratios of the depths that edges give the same cells of an image."""
    cells = int(said.cell.max()) + 1
    number, median = _medians((said.edge[:, None] * cells + said.cell).ravel(), np.log(said.depth).ravel())
    of_edge, of_cell = number // cells, number % cells
    of_image = of_cell // said.cells_per_image
    order = np.lexsort((of_edge, of_image))
    rows: list[tuple[float, float, float, float]] = []
    for inside in np.split(order, np.flatnonzero(np.diff(of_image[order])) + 1):
        edges = np.split(inside, np.flatnonzero(np.diff(of_edge[inside])) + 1)
        rows += ratios_of_image(
            [(int(of_edge[one[0]]), of_cell[one][:, None].astype(np.float64), np.exp(median[one])) for one in edges]
        )
    found = np.array(rows, np.float64).reshape(-1, 4)
    return Ratios(edges=found[:, :2].astype(np.int32), log_ratio=found[:, 2], weight=found[:, 3])


def _agreed(said: _Said, depth: Float64) -> Float64:
    """Depths [M, 2] freed of what pairs are wrong by region by region: medians of cells, then of regions, in turn."""
    _, cell = np.unique(said.cell, return_inverse=True)
    own = 2 * said.edge[:, None] + np.arange(2)  # an image's region as one pair sees it
    _, region = np.unique(own * (int(said.region.max()) + 1) + said.region, return_inverse=True)
    cell, region = cell.ravel(), region.ravel()
    log_depth = np.log(depth).ravel()
    wrong = np.zeros_like(log_depth)
    for _ in range(AGREEMENT_ROUNDS):
        wrong = _medians(region, log_depth - _medians(cell, log_depth - wrong)[1][cell])[1][region]
    return np.asarray(np.exp(log_depth - wrong).reshape(depth.shape))


def _medians(group: Int64, value: Float64) -> tuple[Int64, Float64]:
    """The groups [G], ascending, and the (upper) median of each one's values."""
    order = np.lexsort((value, group))
    named, start = np.unique(group[order], return_index=True)
    end = np.append(start[1:], len(group))
    return named, value[order][(start + end) // 2]


def _focal_lengths(image: Int64, distance_px: Float64, slope: Float64) -> Float64:
    """Focal length [n] of each image that brings slopes of rays to distances from the principal point: least Σ |error|.

    Distances, unlike pixels, do not depend on how the photo was held.
    """
    order = np.lexsort((distance_px / np.maximum(slope, _NEAREST), image))
    image, ratio, weight = image[order], (distance_px / np.maximum(slope, _NEAREST))[order], slope[order]
    start = np.searchsorted(image, np.arange(int(image.max()) + 2))
    total = np.concatenate([[0.0], np.cumsum(weight)])
    middle = np.searchsorted(total, (total[start[:-1]] + total[start[1:]]) / 2) - 1
    return np.asarray(np.maximum(ratio[middle.clip(0, len(ratio) - 1)], 1.0), np.float64)
