"""Canonical pointmaps: one pointmap per image, the mean of what all its pairs say of it (MASt3R-SfM, section 4.3).

Pointmaps go through running sums and are forgotten, so that memory does not grow with the number of pairs. Pixels here
are integers of the network's image, with centres at integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.types import Float64, Int64

GRID_PX = 8
CONFIDENCE_FLOOR = 0.999
"""A confidence of 1, the least that a network gives, still counts a little."""
FOCAL_STEPS = 10
FOCAL_LIMITS = (0.5, 3.5)
"""Times the focal length of a view of 60° across the long side."""
_NEAREST_PX = 1e-8


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Pixels as depths relative to the depth in the middle of their grid cell."""

    index: Int64
    """[M] grid cell, row by row."""
    offset: Float64
    """[M] depth over the cell's depth, at the focal length `CanonicalView.focal_px`."""


@dataclass(frozen=True, kw_only=True)
class CanonicalView:
    """What all pairs of an image together say of its surface."""

    points: Float64
    """[H, W, 3] mean pointmap in the camera frame."""
    confidence: Float64
    """[H, W] mean confidence less its floor, weighted with itself."""
    relative_depth: Float64
    """[H, W] depth over that of the pixel in the middle of the grid cell."""
    grid_px: int
    """Side of the grid cells."""
    focal_px: float

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        height, width = self.confidence.shape
        return -(-height // self.grid_px), -(-width // self.grid_px)

    @property
    def anchor_depth(self) -> Float64:
        """[rows, columns] depth in the middle of each grid cell."""
        rows, columns = cell_centres(self.confidence.shape, self.grid_px)
        return np.asarray(self.points[np.ix_(rows, columns)][..., 2])

    def anchors(self, pixels: Int64) -> Anchors:
        """Anchors of pixels [M, 2] (column, row).

        Raises:
            ShapeError: a pixel lies outside the image.
        """
        height, width = self.confidence.shape
        column, row = pixels[:, 0], pixels[:, 1]
        if len(pixels) and (pixels.min() < 0 or column.max() >= width or row.max() >= height):
            raise ShapeError(f"a pixel lies outside the image of {width}×{height} px")
        index = (row // self.grid_px) * self.cells[1] + column // self.grid_px
        return Anchors(index=index.astype(np.int64), offset=self.relative_depth[row, column])


def cell_centres(shape: tuple[int, ...], grid_px: int) -> tuple[Int64, Int64]:
    """Rows and columns of the middles of the cells of an image [H, W]; a cell cut off before it has its last pixel."""
    rows, columns = (np.minimum(np.arange(0, side, grid_px) + grid_px // 2, side - 1) for side in shape[:2])
    return rows.astype(np.int64), columns.astype(np.int64)


def depth_at_focal(offset: Float64, focal_ratio: Float64) -> Float64:
    """Relative depths that keep the angle of the surface when the focal length changes.

    Args:
        offset: relative depths at the old focal length.
        focal_ratio: old over new focal length.
    """
    return 1.0 + (offset - 1.0) * focal_ratio


class CanonicalSums:
    """Running sums over the pointmaps of one image; `view` may be asked for at any time after the first."""

    def __init__(self, shape: tuple[int, int], grid_px: int = GRID_PX, *, align_scales: bool = True) -> None:
        """Start with nothing.

        Args:
            shape: height and width in pixels.
            grid_px: side of the grid cells.
            align_scales: bring each pointmap to the median depth of the first. Where pairs differ in scale, a plain
                mean, as published, has the scale of the pairs that see a pixel best, and tears where these change.
        """
        self.shape = shape
        self.grid_px = grid_px
        self.align_scales = align_scales
        self.count = 0
        self._depth = 0.0
        self._weight = np.zeros(shape)
        self._squared = np.zeros(shape)
        self._points = np.zeros((*shape, 3))
        self._angle = np.zeros(shape)
        self._base = np.zeros(shape)
        rows, columns = cell_centres(shape, grid_px)
        self._centre = np.ix_(np.repeat(rows, grid_px)[: shape[0]], np.repeat(columns, grid_px)[: shape[1]])

    def add(self, points: Float64, confidence: Float64) -> None:
        """Count one pair's pointmap of the image in.

        Args:
            points: [H, W, 3] in the image's own camera frame.
            confidence: [H, W], at least 1.

        Raises:
            ShapeError: another shape, values that are not finite, or a confidence below 1.
        """
        if points.shape != (*self.shape, 3) or confidence.shape != self.shape:
            raise ShapeError(f"pointmap {points.shape} with confidence {confidence.shape} in an image of {self.shape}")
        if not np.isfinite(points).all() or not confidence.min(initial=1.0) >= 1.0:
            raise ShapeError("a pointmap must be finite, with confidences of at least 1")
        weight = np.asarray(confidence, np.float64) - CONFIDENCE_FLOOR
        points = np.asarray(points, np.float64)
        if self.align_scales:
            depth = float(np.median(points[..., 2]))
            if depth <= 0:
                raise ShapeError("most of a pointmap lies behind its camera")
            self._depth = self._depth or depth
            points = points * (self._depth / depth)
        difference = points - points[self._centre]
        base = np.hypot(difference[..., 0], difference[..., 1])
        self.count += 1
        self._weight += weight
        self._squared += weight**2
        self._points += weight[..., None] * points
        # The angle of the surface, unlike a ratio of depths, averages well where a pair sees an edge differently.
        self._angle += weight * np.arctan2(difference[..., 2], base)
        self._base += base

    def view(self, centre: Float64) -> CanonicalView:
        """The mean of all pointmaps so far.

        Args:
            centre: [2] principal point in pixels, column and row.

        Raises:
            ShapeError: no pointmap was added.
        """
        if not self.count:
            raise ShapeError("a canonical view needs at least one pointmap")
        points = self._points / self._weight[..., None]
        middle = points[self._centre][..., 2]
        step = np.tan(self._angle / self._weight) * self._base / self.count
        return CanonicalView(
            points=points,
            confidence=self._squared / self._weight,
            relative_depth=1.0 + step / middle,
            grid_px=self.grid_px,
            focal_px=focal_of_pointmap(points, centre),
        )


def focal_of_pointmap(points: Float64, centre: Float64, *, limited: bool = True) -> float:
    """Focal length in pixels that brings the points [H, W, 3] of a pinhole camera closest to their pixels.

    The sum of distances, rather than of their squares, is least: Weiszfeld's algorithm (DUSt3R, section 3.3).

    Args:
        points: in the camera frame; points at infinity or of depth 0 say nothing.
        centre: [2] principal point in pixels.
        limited: keep the result within FOCAL_LIMITS.
    """
    height, width = points.shape[:2]
    column, row = np.meshgrid(np.arange(width) - centre[0], np.arange(height) - centre[1])
    pixel = np.stack([column, row], axis=-1).reshape(-1, 2)
    flat = points.reshape(-1, 3).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ray = np.nan_to_num(flat[:, :2] / flat[:, 2:], nan=0.0, posinf=0.0, neginf=0.0)
    along, squared = (ray * pixel).sum(axis=1), (ray**2).sum(axis=1)
    weight = np.ones(len(ray))
    focal = 1.0
    for _ in range(1 + FOCAL_STEPS):
        focal = float((weight * along).sum() / max(float((weight * squared).sum()), 1e-300))
        weight = 1.0 / np.maximum(np.linalg.norm(pixel - focal * ray, axis=1), _NEAREST_PX)
    if not limited:
        return focal
    usual = max(height, width) / (2 * np.tan(np.radians(30.0)))
    return float(np.clip(focal, FOCAL_LIMITS[0] * usual, FOCAL_LIMITS[1] * usual))


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """How much a pair has to say."""

    confidence: float
    """Geometric mean of the mean confidences of the four pointmaps of both decodes."""
    match_confidence: float
    """Sum over the matches."""
    matches: int
    """What the tree is built from."""


def score_pair(confidences: tuple[Float64, Float64, Float64, Float64], match_confidence: Float64) -> PairScore:
    """Score a pair by the confidence of its pointmaps [H, W] and of its matches [M]."""
    means = [float(np.mean(confidence, dtype=np.float64)) for confidence in confidences]
    return PairScore(
        confidence=float(np.exp(np.mean(np.log(means)))),
        match_confidence=float(np.sum(match_confidence, dtype=np.float64)),
        matches=len(match_confidence),
    )
