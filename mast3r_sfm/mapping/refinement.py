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
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import scipy.sparse
import torch
from scipy.spatial import cKDTree

from mast3r_sfm.mapping.patches import Patches, align_patches, cut_windows, smooth
from mast3r_sfm.types import Bool, Float32, Float64, Int64, Tracks

FINEST_SHARE, COARSEST_SHARE = 750.0, 500.0
"""Of a photo's long side, by which the pixels of patches are apart at most: patches are 2 and 3 % of it wide."""
MIN_SPACING = 0.5
"""Photo pixels between those of a patch, at least: the photos have no more to show."""
SMOOTHING = 1.0
"""Of the photos, in pixels of the patches."""
MIN_CORRELATION = 0.6
"""Stricter bounds (0.75, 0.25 px and 4 px) lose more points, 17 instead of 11 % on a façade. They change the poses of
façades and objects little; on a drive straight ahead they take the error of the focal length from 6 to 1 %."""
MAX_MOVE = 6.0
"""Pixels of matching between where an observation is found and where the model expects it."""
MAX_UNCERTAINTY = 1.0
"""Pixels of the patch."""
NEIGHBOURS = 16
MAX_THICKNESS = 0.3
"""Spread of the neighbouring points across their plane over that along it, above which there is no plane."""
MIN_COSINE = 0.35
"""Between the plane's normal and the direction of the views, below which the plane is not believed."""
_MAX_STRETCH = 8.0


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
MIN_VIEW_COSINE = 0.95
MAX_VIEW_STRETCH = 1.5
"""Angle between two views of a point (18°) and change of size up to which one is sought from the other. Wider ones
double the observations, and cost up to 0.007 of AUC@1: there, the plane is no longer the surface."""
MIN_SHARED = 15
"""Points that two images share from which a point of one is sought in the other."""
_BORDER = 8.0


class Geometry(Protocol):
    """The cameras of a model."""

    def project(self, image: int, points: Float64) -> Float64:
        """World points [M, 3] to photo pixels [M, 2]; NaN behind the camera."""
        ...

    def viewing_rays(self, image: int, xy: Float64) -> tuple[Float64, Float64]:
        """The camera's centre [3] and the unit directions [M, 3] of photo pixels, in the world."""
        ...

    def size(self, image: int) -> tuple[int, int]:
        """Width and height of an image in photo pixels."""
        ...


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

    def levels(self, long_side_px: float) -> list[float]:
        """Photo pixels per pixel of the patches, from coarse to fine, for photos of a long side.

        Finest is the full resolution of photos that have enough of it. In smaller ones, a patch of so many pixels would
        show too much of the surface to be flat, and its pixels lie closer than theirs.
        """
        finest = min(max(long_side_px / FINEST_SHARE, MIN_SPACING), 1.0)
        level = min(2.0 * max(self.pixel_scale, 1.0), max(long_side_px / COARSEST_SHARE, finest))
        levels = []
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
        images = np.unique(tracks.image).tolist()
        plan = _plan(tracks, geometry, self.levels(_long_side(images, geometry)))
        xy[plan.moving], kept[plan.moving] = self._align_all(tracks, plan, images, _MATCHED)
        return Refined(xy=xy, kept=kept)

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
        directions = _towards_cameras(tracks, geometry)
        reference, mean = _central_views(tracks, directions)
        expected = _expected(tracks, geometry, directions[reference])
        if not len(expected.point):
            return expected
        both = tracks.joined(expected)
        new = np.arange(len(tracks.point), len(both.point))
        images = np.unique(tracks.image).tolist()
        # Places are known to a pixel or so, and no coarser level is needed.
        levels = self.levels(_long_side(images, geometry))[-1:]
        plan = _alike(_planned(both, geometry, (reference, new), _normals(tracks.points, mean), levels))
        xy, found = self._align_all(both, plan, images, _EXPECTED)
        rows = plan.moving[found] - len(tracks.point)
        return Tracks(
            points=tracks.points,
            point=expected.point[rows],
            image=expected.image[rows],
            keypoint=expected.keypoint[rows],
            xy=xy[found],
        )

    def _align_all(self, tracks: Tracks, plan: _Plan, images: Sequence[int], trust: _Trust) -> tuple[Float64, Bool]:
        """Places [R, 2] of the moving observations of a plan, and whether they are to be believed [R]."""
        xy, good = np.zeros((len(plan.moving), 2)), np.zeros(len(plan.moving), np.bool_)
        with ThreadPoolExecutor(self.threads) as pool:
            windows = self._cut_all(pool, tracks, plan, images)
            work = [np.flatnonzero(tracks.image[plan.moving] == image) for image in images]
            found = pool.map(lambda image, mine: self._align(image, plan, mine, windows, trust), images, work)
            for mine, (place, believed) in zip(work, found, strict=True):
                xy[mine], good[mine] = place, believed
        return xy, good

    def _cut_all(self, pool: Executor, tracks: Tracks, plan: _Plan, images: Sequence[int]) -> list[torch.Tensor]:
        """Per level, the windows [K, …] of all points in their reference's photo."""
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
        self, image: int, plan: _Plan, mine: Int64, windows: Sequence[torch.Tensor], trust: _Trust
    ) -> tuple[Float64, Bool]:
        """Places [M, 2] of the moving observations `mine` of an image, and whether they are to be believed."""
        grey = torch.from_numpy(self.load_grey(image))
        affine, start = torch.from_numpy(plan.affine[mine]).float(), torch.from_numpy(plan.start[mine]).float()
        point, good = torch.from_numpy(plan.point[mine]), torch.from_numpy(plan.usable[mine])
        place = start
        for level, cut in zip(plan.levels, windows, strict=True):
            found = align_patches(smooth(grey, SMOOTHING * level), Patches.prepare(cut[point]), level * affine, place)
            place = found.xy
        good &= found.converged & (found.correlation > trust.correlation) & (found.uncertainty < trust.uncertainty)
        good &= (place - start).norm(dim=1) < trust.move * max(self.pixel_scale, 1.0)
        return place.double().numpy(), good.numpy()


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Which observations are aligned to which, and how their patches are distorted."""

    reference: Int64
    """[K] the observation of each point that the others are aligned to."""
    moving: Int64
    """[R] the other observations."""
    point: Int64
    """[R] the point of each."""
    affine: Float64
    """[R, 2, 2] from pixels of the reference's photo to those of the observation's."""
    start: Float64
    """[R, 2] where the observation is expected."""
    usable: Bool
    """[R]: the affine map is one that a patch survives."""
    levels: Sequence[float]
    """Photo pixels per pixel of the patches, from coarse to fine."""


def _long_side(images: Sequence[int], geometry: Geometry) -> float:
    """Photo pixels: the median of the images."""
    return float(np.median([max(geometry.size(image)) for image in images]))


def _plan(tracks: Tracks, geometry: Geometry, levels: Sequence[float]) -> _Plan:
    """All observations aligned to the most central one of their point."""
    reference, mean = _central_views(tracks, _towards_cameras(tracks, geometry))
    is_moving = np.ones(len(tracks.point), bool)
    is_moving[reference] = False
    return _planned(tracks, geometry, (reference, np.flatnonzero(is_moving)), _normals(tracks.points, mean), levels)


def _planned(
    tracks: Tracks, geometry: Geometry, observations: tuple[Int64, Int64], normals: Float64, levels: Sequence[float]
) -> _Plan:
    """How some observations are aligned to others.

    Args:
        tracks: of a model.
        geometry: its cameras.
        observations: [K] reference of each point; [R] what is aligned.
        normals: [K, 3] of the surface.
        levels: of the patches.
    """
    reference, moving = observations
    affine, start = _transfer(tracks, geometry, reference[tracks.point[moving]], moving, normals, reach=levels[0])
    with np.errstate(invalid="ignore"):
        stretch = np.abs(np.linalg.det(affine))
        usable = np.isfinite(affine).all(axis=(1, 2)) & np.isfinite(start).all(axis=1)
        usable &= (stretch > 1 / _MAX_STRETCH) & (stretch < _MAX_STRETCH)
    affine[~usable], start[~usable] = np.eye(2), tracks.xy[moving[~usable]]
    return _Plan(
        reference=reference,
        moving=moving,
        point=tracks.point[moving],
        affine=affine,
        start=start,
        usable=usable,
        levels=levels,
    )


def _central_views(tracks: Tracks, directions: Float64) -> tuple[Int64, Float64]:
    """[K] the observation that sees each point from the middle of all its views, and [K, 3] that middle direction.

    The most central view distorts the patch least on the way to all others.

    Args:
        tracks: at least one observation of every point.
        directions: [O, 3] from the points to the cameras of their observations.
    """
    mean = np.zeros_like(tracks.points)
    np.add.at(mean, tracks.point, directions)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True).clip(min=1e-12)
    central = (directions * mean[tracks.point]).sum(axis=1)
    order = np.lexsort((-central, tracks.point))
    return order[np.r_[True, np.diff(tracks.point[order]) > 0]], mean


def _expected(tracks: Tracks, geometry: Geometry, central: Float64) -> Tracks:
    """Where images should show points that they share with others but did not match.

    Args:
        tracks: of a model.
        geometry: its cameras.
        central: [K, 3] direction from each point to its central view; images that see it at a wider angle are left out.
    """
    images, column = np.unique(tracks.image, return_inverse=True)
    ones = np.ones(len(tracks.point), np.int32)
    sees = scipy.sparse.csr_array((ones, (tracks.point, column)), shape=(len(tracks.points), len(images)))
    shared = ((sees.T @ sees) >= MIN_SHARED).astype(np.int32).toarray()
    point, image, xy = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros((0, 2))]
    for number, one in enumerate(images.tolist()):
        near = np.asarray(sees @ shared[:, number], np.int32) > 0
        near[tracks.point[tracks.image == one]] = False
        points = np.flatnonzero(near)
        towards = geometry.viewing_rays(one, np.zeros((0, 2)))[0] - tracks.points[points]
        cosine = (towards * central[points]).sum(axis=1) / np.linalg.norm(towards, axis=1).clip(min=1e-12)
        points = points[cosine > MIN_VIEW_COSINE]
        places = geometry.project(one, tracks.points[points])
        inside = ((places > _BORDER) & (places < np.array(geometry.size(one)) - _BORDER)).all(axis=1)
        point.append(points[inside])
        image.append(np.full(int(inside.sum()), one))
        xy.append(places[inside])
    joined = np.concatenate(point)
    return Tracks(
        points=tracks.points,
        point=joined,
        image=np.concatenate(image),
        keypoint=np.full(len(joined), -1),
        xy=np.concatenate(xy),
    )


def _alike(plan: _Plan) -> _Plan:
    """The part of a plan in which patches keep about their size."""
    stretch = np.asarray(np.linalg.svd(plan.affine)[1], np.float64)
    alike = plan.usable & (stretch[:, 0] < MAX_VIEW_STRETCH) & (stretch[:, 1] > 1 / MAX_VIEW_STRETCH)
    return replace(
        plan,
        moving=plan.moving[alike],
        point=plan.point[alike],
        affine=plan.affine[alike],
        start=plan.start[alike],
        usable=plan.usable[alike],
    )


def _towards_cameras(tracks: Tracks, geometry: Geometry) -> Float64:
    """[O, 3] unit directions from each observation's point to its camera."""
    directions = np.empty((len(tracks.point), 3))
    for image in np.unique(tracks.image):
        mine = tracks.image == image
        centre, _ = geometry.viewing_rays(int(image), np.zeros((0, 2)))
        directions[mine] = centre - tracks.points[tracks.point[mine]]
    unit: Float64 = directions / np.linalg.norm(directions, axis=1, keepdims=True).clip(min=1e-12)
    return unit


def _normals(points: Float64, towards: Float64) -> Float64:
    """[K, 3] unit normals of the surface at each point, from its neighbours; `towards` [K, 3] where they show none."""
    count = min(NEIGHBOURS, len(points))
    found = cKDTree(points).query(points, k=range(1, count + 1))
    distance, neighbours = np.asarray(found[0], np.float64), np.asarray(found[1], np.int64)
    middle = np.median(distance, axis=1, keepdims=True).clip(min=1e-12)
    weight = 1 / (1 + (distance / middle) ** 2)
    offsets = points[neighbours] - points[:, None]
    spread, axes = np.linalg.eigh(np.einsum("kn,kni,knj->kij", weight, offsets, offsets))
    normals = axes[:, :, 0]
    normals = normals * np.where((normals * towards).sum(axis=1) < 0, -1.0, 1.0)[:, None]
    is_plane = (spread[:, 0] < MAX_THICKNESS * spread[:, 1]) & ((normals * towards).sum(axis=1) > MIN_COSINE)
    chosen: Float64 = np.where(is_plane[:, None], normals, towards)
    return chosen


def _transfer(
    tracks: Tracks, geometry: Geometry, reference: Int64, moving: Int64, normals: Float64, reach: float
) -> tuple[Float64, Float64]:
    """How the plane at a point maps the reference's photo to that of a moving observation.

    Args:
        tracks: of the model.
        geometry: its cameras.
        reference: [R] observations.
        moving: [R] observations of the same points.
        normals: [K, 3] of the planes.
        reach: photo pixels over which the map is measured.

    Returns:
        [R, 2, 2] the map's derivative; [R, 2] where it takes the reference's keypoint.
    """
    points, normal = tracks.points[tracks.point[moving]], normals[tracks.point[moving]]
    probes = reach * np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    seen = np.empty((len(probes), len(moving), 2))
    seen_by = {int(image): np.flatnonzero(tracks.image[reference] == image) for image in np.unique(tracks.image)}
    seen_in = {int(image): np.flatnonzero(tracks.image[moving] == image) for image in np.unique(tracks.image)}
    for number, probe in enumerate(probes):
        on_plane = np.empty_like(points)
        for image, mine in seen_by.items():
            centre, rays = geometry.viewing_rays(image, tracks.xy[reference[mine]] + probe)
            with np.errstate(divide="ignore", invalid="ignore"):
                depth = ((points[mine] - centre) * normal[mine]).sum(axis=1) / (rays * normal[mine]).sum(axis=1)
            on_plane[mine] = centre + rays * depth[:, None]
        for image, mine in seen_in.items():
            seen[number, mine] = geometry.project(image, on_plane[mine])
    affine = np.stack([seen[1] - seen[2], seen[3] - seen[4]], axis=2) / (2 * reach)
    return affine, seen[0]
