"""Sub-pixel refinement: every observation of a track is moved to where it shows what the track's best view shows.

Keypoints of learned features are good to about a pixel; bundle adjustment can be no better than they are. Once a first
model says how a track's views are placed, its surface patch can be compared between the photos themselves, at their
full resolution. The best view keeps its keypoint and says which point of the surface is meant; the others are aligned
to it, under the affine map that the plane through the neighbouring points implies. What does not align is no
observation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from mast3r_sfm.mapping.patches import CONVERGED, NEAR, RADIUS, Patches, align_patches, cut_windows, smooth
from mast3r_sfm.mapping.planning import Geometry, Plan, plan_completion, plan_extension, plan_refinement, seen_beside
from mast3r_sfm.types import Bool, Float32, Float64, Int64, Tracks, Usable

FINEST_SHARE, COARSEST_SHARE = 768.0, 500.0
"""Of a photo's long side, by which the pixels of patches are apart at most (but no less than a pixel of
matching on the coarsest level): patches are 2 and 3 % of it wide."""
MIN_SPACING = 0.5
"""Photo pixels between those of a patch, at least: the photos have no more to show."""
SMOOTHING = 1.0
"""Of the photos, in pixels of the patches."""
MIN_CORRELATION = 0.6
"""Stricter bounds (0.75, 0.25 px and 4 px) lose more points, 17 instead of 11 % on a façade. They change the poses of
façades and objects little; on a drive straight ahead they take the error of the focal length from 6 to 1 %."""
MAX_MOVE = 6.0
"""Pixels of matching between where an observation is found and where the model expects it."""
GIVEN_UP = 2.0
"""Times as far as that, an observation is not expected to come back."""
BESIDE = 2.0
"""Pixels of matching by which the matches of two pairs may miss each other on one place."""
MAX_UNCERTAINTY = 1.0
"""Pixels of the patch."""


@dataclass(frozen=True, kw_only=True)
class _Trust:
    """What an aligned observation must keep to be believed."""

    correlation: float
    move: float
    """Pixels of matching from where the model expects it, at most."""
    uncertainty: float
    """Pixels of the patch, at most."""


_MATCHED = _Trust(correlation=MIN_CORRELATION, move=MAX_MOVE, uncertainty=MAX_UNCERTAINTY)
_EXPECTED = _Trust(correlation=0.85, move=1.0, uncertainty=0.3)
"""Stricter, since no match speaks for it: a second detection in the same photo is all that would."""


@dataclass(frozen=True, kw_only=True)
class Refined:
    """What became of the observations of `Tracks`, in their order."""

    xy: Float64
    """[O, 2] photo pixels."""
    kept: Bool
    """[O]: false where the observation does not show what the track's best view shows."""


@dataclass(frozen=True, kw_only=True)
class Refiner:
    """Refines the tracks of one model after the other."""

    load_grey: Callable[[int], Float32]
    """The stored pixels of an image [H, W], by its number."""
    pixel_scale: float
    """Photo pixels per pixel of matching: how far observations may be off."""
    threads: int
    usable: Usable | None = None
    """Says where observations may lie; None: everywhere."""

    def levels(self, long_side_px: float) -> list[float]:
        """Photo pixels per pixel of the patches, from coarse to fine, for photos of a long side.

        Finest is the full resolution of photos that have enough of it. In smaller ones, a patch of so many pixels would
        show too much of the surface to be flat, and its pixels lie closer than theirs.
        """
        finest = min(max(long_side_px / FINEST_SHARE, MIN_SPACING), 1.0)
        scale = max(self.pixel_scale, 1.0)
        level, levels = min(max(long_side_px / COARSEST_SHARE, scale), 2 * scale), []
        while level >= 1.5 * finest:
            levels.append(level)
            level /= 2
        return [*levels, finest]

    def refine(self, tracks: Tracks, geometry: Geometry) -> Refined:
        """Align all observations of the tracks of one model.

        Args:
            tracks: of a bundle-adjusted model.
            geometry: its cameras.
        """
        xy, kept = tracks.xy.copy(), np.ones(len(tracks.xy), bool)
        if not len(xy):
            return Refined(xy=xy, kept=kept)
        plan = plan_refinement(tracks, geometry, self.levels(_long_side(tracks, geometry)))
        xy[plan.moving], kept[plan.moving] = self._align_all(tracks, plan, _MATCHED)
        return Refined(xy=xy, kept=kept)

    def complete(self, tracks: Tracks, geometry: Geometry, lost: Tracks) -> Tracks:
        """Find what tracks lack though matches speak for it, now that the model is better.

        That is what did not align before, and points next to which an image observes another one. Each is aligned to
        the view of its point that is nearest to it, from where the model expects it.

        Args:
            tracks: of a model that was adjusted to refined observations.
            geometry: its cameras.
            lost: the same points, with observations that they had before.

        Returns:
            the same points with what was found: of the lost ones, and others, whose keypoint is -1.
        """
        if not len(tracks.point):
            return tracks
        radius_px = BESIDE * max(self.pixel_scale, 1.0)
        sought = lost.joined(seen_beside(tracks.joined(lost), geometry, radius_px))
        if not len(sought.point):
            return sought
        plan = plan_completion(tracks, geometry, sought, self.levels(_long_side(tracks, geometry))[-1:])
        xy, found = self._align_all(tracks.joined(sought), plan, _EXPECTED)
        return Tracks(
            points=sought.points,
            point=sought.point[found],
            image=sought.image[found],
            keypoint=sought.keypoint[found],
            xy=xy[found],
        )

    def extend(self, tracks: Tracks, geometry: Geometry) -> Tracks:
        """Find the points of a model in further images that see them at much the same angle and size.

        A keypoint is detected in some of the photos that show it. In the others, its patch is looked for where the
        model expects it.

        Args:
            tracks: of a model that was adjusted to refined observations.
            geometry: its cameras.

        Returns:
            the same points with the new observations alone, whose keypoint is -1.
        """
        if not len(tracks.point):
            return tracks
        # Places are known to a pixel or so, and no coarser level is needed.
        expected, plan = plan_extension(tracks, geometry, self.levels(_long_side(tracks, geometry))[-1:])
        if not len(expected.point):
            return expected
        xy, found = self._align_all(tracks.joined(expected), plan, _EXPECTED)
        rows = plan.moving[found] - len(tracks.point)
        return Tracks(
            points=tracks.points,
            point=expected.point[rows],
            image=expected.image[rows],
            keypoint=expected.keypoint[rows],
            xy=xy[found],
        )

    def _align_all(self, tracks: Tracks, plan: Plan, trust: _Trust) -> tuple[Float64, Bool]:
        """Places [R, 2] of the moving observations of a plan, and whether they are to be believed [R]."""
        xy, good = np.zeros((len(plan.moving), 2)), np.zeros(len(plan.moving), np.bool_)
        images = np.unique(tracks.image).tolist()
        with ThreadPoolExecutor(self.threads) as pool:
            windows = self._cut_all(pool, tracks, plan, images)
            work = [np.flatnonzero(tracks.image[plan.moving] == image) for image in images]
            found = pool.map(lambda image, mine: self._align(image, plan, mine, windows, trust), images, work)
            for mine, (place, believed) in zip(work, found, strict=True):
                xy[mine], good[mine] = place, believed
        return xy, good

    def _cut_all(self, pool: Executor, tracks: Tracks, plan: Plan, images: Sequence[int]) -> list[torch.Tensor]:
        """Per level, the windows [W, …] of all references."""
        work = {image: np.flatnonzero(tracks.image[plan.reference] == image) for image in images}
        cuts = pool.map(lambda image: self._cut(image, tracks.xy[plan.reference[work[image]]], plan.levels), images)
        windows: list[torch.Tensor] = []
        for image, cut in zip(images, cuts, strict=True):
            windows = windows or [level.new_zeros((len(plan.reference), *level.shape[1:])) for level in cut]
            for whole, part in zip(windows, cut, strict=True):
                whole[torch.from_numpy(work[image])] = part
        return windows

    @torch.inference_mode()
    def _cut(self, image: int, xy: Float64, levels: Sequence[float]) -> list[torch.Tensor]:
        grey, places = torch.from_numpy(self.load_grey(image)), torch.from_numpy(xy).float()
        return [cut_windows(smooth(grey, SMOOTHING * level), places, level) for level in levels]

    @torch.inference_mode()
    def _align(
        self, image: int, plan: Plan, mine: Int64, windows: Sequence[torch.Tensor], trust: _Trust
    ) -> tuple[Float64, Bool]:
        """Places [M, 2] of the moving observations `mine` of an image, and whether they are to be believed."""
        grey = torch.from_numpy(self.load_grey(image))
        affine, start = torch.from_numpy(plan.affine[mine]).float(), torch.from_numpy(plan.start[mine]).float()
        window, good = torch.from_numpy(plan.window[mine]), torch.from_numpy(plan.usable[mine])
        # Beyond its own width, a patch is found by chance.
        reach = min(trust.move, RADIUS * plan.levels[-1]) * max(self.pixel_scale, 1.0)
        place = start
        for level, cut in zip(plan.levels, windows, strict=True):
            seen, reference = smooth(grey, SMOOTHING * level), Patches.prepare(cut[window])
            tolerance = CONVERGED if level == plan.levels[-1] else NEAR
            found = align_patches(seen, reference, level * affine, place, tolerance, GIVEN_UP * reach)
            place = found.xy
        good &= found.converged & (found.correlation > trust.correlation) & (found.uncertainty < trust.uncertainty)
        good &= (place - start).norm(dim=1) < reach
        # Beyond the border, a photo seems to go on as its border is.
        good &= ((place >= 0) & (place < place.new_tensor([grey.shape[1], grey.shape[0]]))).all(dim=1)
        xy = place.double().numpy()
        return xy, good.numpy() if self.usable is None else good.numpy() & self.usable(image, xy)


def _long_side(tracks: Tracks, geometry: Geometry) -> float:
    """Photo pixels: the median of the images that see the tracks."""
    return float(np.median([max(geometry.size(image)) for image in np.unique(tracks.image).tolist()]))
