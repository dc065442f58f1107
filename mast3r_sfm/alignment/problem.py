"""What the alignment of pointmaps is given and what it solves for, as flat arrays over all edges at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mast3r_sfm.alignment.canonical import CanonicalView, depth_at_focal
from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Bool, Float64, Int32, Int64


@dataclass(frozen=True, kw_only=True)
class PointmapProblem:
    """Canonical views of N images, their A anchors, C cameras, and E edges with M matches."""

    base_focal_px: Float64
    """[N] focal length that the canonical view of each image implies; offsets of its pixels hold there."""
    camera_of_image: Int32
    """[N] images of one camera share a focal length."""
    known_focal_px: Float64
    """[C] focal length of a camera where it is known and not to be changed, NaN elsewhere."""
    image_of_anchor: Int64
    """[A]."""
    anchor_depth: Float64
    """[A] canonical depth, positive."""
    pairs: Int32
    """[E, 2] image numbers, first < second."""
    start: Int64
    """[E + 1] the matches of edge e are start[e] … start[e + 1] − 1."""
    pixels: Float64
    """[M, 2, 2] by match and side: pixel less the principal point."""
    anchor: Int64
    """[M, 2] anchor of each side."""
    offset: Float64
    """[M, 2] depth over the anchor's."""
    weight: Float64
    """[M] trust in the match, of mean 1 or so."""
    place_error_px: float = 0.0
    """How far off a match is in the image that its point comes from. What that does to its depth, where surfaces are
    steep or end, the fine loss allows for."""

    def __post_init__(self) -> None:
        images, matches, anchors = len(self.base_focal_px), len(self.weight), len(self.anchor_depth)
        for name, shape in {
            "camera_of_image": (images,),
            "image_of_anchor": (anchors,),
            "pairs": (len(self.start) - 1, 2),
            "pixels": (matches, 2, 2),
            "anchor": (matches, 2),
            "offset": (matches, 2),
        }.items():
            if getattr(self, name).shape != shape:
                raise ShapeError(f"PointmapProblem.{name} has shape {getattr(self, name).shape}, expected {shape}")
        if self.start[0] != 0 or self.start[-1] != matches or (np.diff(self.start) < 1).any():
            raise ShapeError(
                "PointmapProblem.start must run from 0 to the number of matches, with one per edge at least"
            )
        if (self.pairs[:, 0] >= self.pairs[:, 1]).any():
            raise ShapeError("PointmapProblem.pairs must have first < second")
        if not (self.anchor_depth > 0).all() or not (self.base_focal_px > 0).all() or not (self.weight >= 0).all():
            raise ShapeError("PointmapProblem: depths and focal lengths must be positive, weights not negative")

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.base_focal_px)

    @property
    def num_cameras(self) -> int:
        """C."""
        return len(self.known_focal_px)

    @property
    def focal_is_known(self) -> Bool:
        """[C]."""
        return np.isfinite(self.known_focal_px)

    @property
    def edge_of_match(self) -> Int64:
        """[M]."""
        return np.repeat(np.arange(len(self.pairs)), np.diff(self.start))

    def with_edges(self, kept: Bool) -> PointmapProblem:
        """The same with only some of the edges [E]."""
        matches = kept[self.edge_of_match]
        start = np.concatenate([[0], np.cumsum(np.diff(self.start)[kept])])
        return replace(
            self,
            pairs=self.pairs[kept],
            start=start.astype(np.int64),
            pixels=self.pixels[matches],
            anchor=self.anchor[matches],
            offset=self.offset[matches],
            weight=self.weight[matches],
        )


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where everything is, up to a similarity."""

    cam_from_world: Float64
    """[N, 3, 4]."""
    log_scale: Float64
    """[N] logarithm of world units per unit of the canonical view: scales cannot become negative."""
    log_depth: Float64
    """[A] logarithm of an anchor's depth over its canonical depth."""
    focal_px: Float64
    """[C]."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some edges with about as many matches each, side by side."""

    edges: Int64
    """[B]."""
    rows: Int64
    """[B, K] matches; where an edge has fewer, its first again."""
    used: Float64
    """[B, K] 1 for a match and 0 for a repeated one."""


MAX_ROWS = 1 << 16
"""Matches in a batch, at most (unless one edge has more): what is computed for each at a time is a few kB."""


def make_batches(start: Int64, chosen: Int64 | None = None) -> list[Batch]:
    """Put edges of similar size together, so that arrays over them are filled by half at least.

    Args:
        start: [E + 1] as in `PointmapProblem`.
        chosen: edges to take; all by default.
    """
    counts = np.diff(start)
    within = np.arange(len(counts)) if chosen is None else chosen
    order = within[np.argsort(-counts[within], kind="stable")]
    batches, at = [], 0
    while at < len(order):
        size = int(counts[order[at]])
        similar = int((2 * counts[order[at:]] >= size).sum())
        edges = order[at : at + min(similar, max(1, MAX_ROWS // size))]
        column = np.arange(size)
        used = column < counts[edges][:, None]
        rows = start[edges][:, None] + np.where(used, column, 0)
        batches.append(Batch(edges=edges, rows=rows, used=used.astype(np.float64)))
        at += len(edges)
    return batches


@dataclass(frozen=True, kw_only=True)
class EdgeMatches:
    """The matches of a pair of images with canonical views, first < second."""

    first: int
    second: int
    pixels_first: Int64
    """[M, 2] column and row."""
    pixels_second: Int64
    confidence: Float64
    """[M] positive."""


def make_problem(
    views: Sequence[CanonicalView],
    centres: Float64,
    edges: Sequence[EdgeMatches],
    camera_of_image: Int32 | None = None,
    known_focal_px: Float64 | None = None,
) -> PointmapProblem:
    """Put canonical views and matches together.

    Args:
        views: of all N images.
        centres: [N, 2] principal points in pixels.
        edges: all with one match at least.
        camera_of_image: [N]; a camera each by default.
        known_focal_px: [C], NaN where it is not known; none is by default.
    """
    cells = [view.anchor_depth.size for view in views]
    first_anchor = np.concatenate([[0], np.cumsum(cells)])
    cameras = np.arange(len(views), dtype=np.int32) if camera_of_image is None else camera_of_image
    pixels, anchors, offsets = [], [], []
    for edge in edges:
        sides = ((edge.first, edge.pixels_first), (edge.second, edge.pixels_second))
        found = [views[image].anchors(xy) for image, xy in sides]
        pixels.append(np.stack([xy - centres[image] for image, xy in sides], axis=1))
        anchors.append(
            np.stack([one.index + first_anchor[image] for one, (image, _) in zip(found, sides, strict=True)], axis=1)
        )
        offsets.append(np.stack([one.offset for one in found], axis=1))
    confidence = np.concatenate([edge.confidence for edge in edges])
    return PointmapProblem(
        base_focal_px=np.array([view.focal_px for view in views]),
        camera_of_image=cameras,
        known_focal_px=np.full(int(cameras.max()) + 1, np.nan) if known_focal_px is None else known_focal_px,
        image_of_anchor=np.repeat(np.arange(len(views)), cells),
        anchor_depth=np.concatenate([view.anchor_depth.ravel() for view in views]),
        pairs=np.array([(edge.first, edge.second) for edge in edges], np.int32).reshape(-1, 2),
        start=np.concatenate([[0], np.cumsum([len(edge.confidence) for edge in edges])]).astype(np.int64),
        pixels=np.concatenate(pixels).astype(np.float64),
        anchor=np.concatenate(anchors),
        offset=np.concatenate(offsets),
        weight=confidence / confidence.mean(),
    )


LEAST_RELATIVE = 0.05
"""Depth over the anchor's that is believed, at least: at the edge of a surface, an averaged angle may point behind."""


def camera_points(problem: PointmapProblem, scene: Scene, rows: Int64, images: Int64, side: int) -> Float64:
    """Matched points [B, K, 3] of matches [B, K] in the camera frame of their image [B], in world units."""
    anchor = problem.anchor[rows, side]
    focal = scene.focal_px[problem.camera_of_image[images]]
    relative = depth_at_focal(problem.offset[rows, side], (problem.base_focal_px[images] / focal)[:, None])
    relative = np.maximum(relative, LEAST_RELATIVE)
    depth = np.exp(scene.log_scale[images][:, None] + scene.log_depth[anchor]) * problem.anchor_depth[anchor] * relative
    ray = problem.pixels[rows, side] / focal[:, None, None]
    return np.concatenate([depth[..., None] * ray, depth[..., None]], axis=-1)
