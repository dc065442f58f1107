"""Focal lengths with which relative poses explain the matches of the pairs best.

A fundamental matrix of a nearly flat scene, or of a wide baseline, may be far off although its inliers are right, and
so is the focal length that follows from it. An essential matrix has two degrees of freedom less. For each focal length
that is tried, the pose that explains a pair best is sought anew among all of its distinct matches; the likelihood of
the matches, summed over the pairs, then depends on nothing but the focal lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import poselib

from mast3r_sfm.geometry.epipolar import sampson_error
from mast3r_sfm.matching.check import EpipolarEdge, Pinhole, fundamental_between
from mast3r_sfm.types import Bool, Float64, Int32, Int64

TYPICAL_RATIO = 1.0
"""Focal length over the image's long side where nothing is known: between a phone's 0.75 and a short tele lens."""
PRIOR_SIGMA = 0.7
"""Of the logarithm of the ratio, about TYPICAL_RATIO; decides only where the pairs say nothing."""
FIRST_STEP = 1.3
"""Factor between the focal lengths that are tried first."""
NUM_FIRST = 10
LAST_STEP = 1.04
"""Factor at which the search ends: bundle adjustment takes it from there."""
MAX_SWEEPS = 8
PAIRS, PAIRS_PER_CAMERA = 12, 5
"""Pairs that are looked at in all, and for each camera; the larger of both numbers counts."""
MAX_CAMERAS = 50
"""Unknown ones beyond which the start is left as it is: the search takes a second for every few of them, and where
photos are many, aligning them finds all focal lengths together."""
MAX_MATCHES = 250
NOISE_PX, FAR_PX = 1.0, 4.0
"""Errors of matches beyond which they count by their logarithm, and not at all."""
MIN_ITERATIONS, MAX_ITERATIONS = 50, 150


def fit_focal_ratios(
    edges: Sequence[EpipolarEdge],
    camera_of_image: Int32,
    sizes: Float64,
    centres: Float64,
    ratios: Float64,
    unknown: Bool,
    threads: int,
) -> Float64:
    """Focal length of each camera, over the long side of its image.

    Args:
        edges: pairs that show the same place.
        camera_of_image: [N] camera of each image.
        sizes: [N, 2] width and height in network pixels.
        centres: [N, 2] principal points in network pixels.
        ratios: [C] where to start.
        unknown: [C] cameras whose ratio is sought; the others keep theirs.
        threads: pairs that are looked at side by side.

    Returns:
        [C].
    """
    if unknown.sum() > MAX_CAMERAS:
        return ratios
    pairs = [_Pair.of(edge, camera_of_image, sizes, centres) for edge in _most_telling(edges, camera_of_image, unknown)]
    cameras = np.array([pair.cameras for pair in pairs]).reshape(-1, 2)
    unknown = unknown & np.isin(np.arange(len(ratios)), cameras)
    if not unknown.any():
        return ratios
    with ThreadPoolExecutor(threads) as pool:
        search = _Search(pairs=pairs, cameras=cameras, unknown=unknown, pool=pool)
        return search.run(ratios)


def _most_telling(edges: Sequence[EpipolarEdge], camera_of_image: Int32, unknown: Bool) -> list[EpipolarEdge]:
    """Of each unknown camera the pairs with most matches off one plane; in the order of the edges."""
    telling = np.array([min(edge.num_inliers, MAX_MATCHES) * (1.1 - edge.homography_share) for edge in edges])
    cameras = camera_of_image[np.array([(edge.first, edge.second) for edge in edges], np.int64).reshape(-1, 2)]
    each = max(PAIRS_PER_CAMERA, -(-PAIRS // max(int(unknown.sum()), 1)))
    chosen: set[int] = set()
    for camera in np.flatnonzero(unknown):
        own = np.flatnonzero((cameras == camera).any(axis=1))
        chosen.update(own[np.argsort(-telling[own], kind="stable")][:each].tolist())
    return [edges[number] for number in sorted(chosen)]


@dataclass(frozen=True, kw_only=True)
class _Pair:
    cameras: tuple[int, int]
    views: tuple[Pinhole, Pinhole]
    """With a focal length of the image's long side."""
    xy: tuple[Float64, Float64]
    """[M, 2] distinct matches, the best first."""
    best_lie_apart: bool
    """Unlike those of a pointmap, so that poses may be drawn from the best matches first."""

    @classmethod
    def of(cls, edge: EpipolarEdge, camera_of_image: Int32, sizes: Float64, centres: Float64) -> _Pair:
        """Of an edge."""
        images = edge.first, edge.second
        xy_first, xy_second = edge.judged(MAX_MATCHES)
        first, second = (Pinhole(focal_px=float(sizes[image].max()), centre_px=centres[image]) for image in images)
        return cls(
            cameras=(int(camera_of_image[edge.first]), int(camera_of_image[edge.second])),
            views=(first, second),
            xy=(xy_first, xy_second),
            best_lie_apart=edge.points_first is None,
        )

    def cost(self, ratios: tuple[float, float]) -> float:
        """Negative logarithm of the likelihood of the matches, but for a constant."""
        first, second = (
            replace(view, focal_px=ratio * view.focal_px) for view, ratio in zip(self.views, ratios, strict=True)
        )
        cameras = first.poselib_camera(), second.poselib_camera()
        options = {
            "max_epipolar_error": 2 * NOISE_PX,
            "min_iterations": MIN_ITERATIONS,
            "max_iterations": MAX_ITERATIONS,
            "progressive_sampling": self.best_lie_apart,
        }
        pose, _ = poselib.estimate_relative_pose(*self.xy, *cameras, options)
        fundamental = fundamental_between(first, second, pose.R, pose.t)
        error = np.minimum(sampson_error(fundamental, *self.xy), FAR_PX)
        return float(np.log1p((error / NOISE_PX) ** 2).sum())


@dataclass(frozen=True, kw_only=True)
class _Search:
    """One camera after the other, the rest held, in ever smaller steps."""

    pairs: list[_Pair]
    cameras: Int64
    """[P, 2]."""
    unknown: Bool
    """[C]."""
    pool: ThreadPoolExecutor
    _known: dict[tuple[int, float, float], float] = field(default_factory=dict)

    def run(self, start: Float64) -> Float64:
        """[C] from a start that may be far off."""
        first = FIRST_STEP ** (np.arange(NUM_FIRST) - (NUM_FIRST - 1) / 2)
        alike = [np.where(self.unknown, TYPICAL_RATIO * factor, start) for factor in first]
        ratios = self._best([start, *alike], self.unknown)
        step, several = FIRST_STEP, self.unknown.sum() > 1
        while step > LAST_STEP:
            for _ in range(MAX_SWEEPS if several else 1):
                before = ratios
                if several:
                    for camera in np.flatnonzero(self.unknown):
                        ratios = self._nearby(ratios, np.arange(len(ratios)) == camera, step)
                ratios = self._nearby(ratios, self.unknown, step)
                if np.array_equal(ratios, before):
                    break
            step = np.sqrt(step)
        return ratios

    def _nearby(self, ratios: Float64, free: Bool, step: float) -> Float64:
        return self._best([ratios, *(np.where(free, ratios * factor, ratios) for factor in (1 / step, step))], free)

    def _best(self, tried: Sequence[Float64], free: Bool) -> Float64:
        """The first of those that explain the pairs of the free cameras best."""
        rows = np.flatnonzero(free[self.cameras].any(axis=1)).tolist()
        keys = [[self._key(row, ratios) for row in rows] for ratios in tried]
        missing = sorted({key for some in keys for key in some} - self._known.keys())
        found = self.pool.map(lambda key: self.pairs[key[0]].cost(key[1:]), missing)
        self._known.update(zip(missing, found, strict=True))
        costs = [
            sum(self._known[key] for key in some)
            + float((np.log(ratios[free] / TYPICAL_RATIO) ** 2).sum()) / (2 * PRIOR_SIGMA**2)
            for some, ratios in zip(keys, tried, strict=True)
        ]
        return tried[int(np.argmin(costs))]

    def _key(self, row: int, ratios: Float64) -> tuple[int, float, float]:
        first, second = self.cameras[row]
        return row, round(float(ratios[first]), 6), round(float(ratios[second]), 6)
