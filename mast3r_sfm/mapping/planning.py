"""Which observations of a model are aligned to which, and how its surface distorts their patches on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import scipy.sparse
from scipy.spatial import cKDTree

from mast3r_sfm.types import Bool, Float64, Int64, Tracks

NEIGHBOURS = 16
MAX_THICKNESS = 0.3
"""Spread of the neighbouring points across their plane over that along it, above which there is no plane."""
MIN_COSINE = 0.35
"""Between the plane's normal and the direction of the views, below which the plane is not believed."""
_MAX_STRETCH = 8.0
MIN_VIEW_COSINE = 0.95
MAX_VIEW_STRETCH = 1.5
"""Angle between two views of a point (18°) and change of size up to which one is sought from the other. Wider ones
double the observations, and cost up to 0.007 of AUC@1: there, the plane is no longer the surface."""
MIN_SHARED = 15
"""Points that two images share from which a point of one is sought in the other."""
SAME_DEPTH = 0.02
"""Relative difference of depths up to which two points side by side lie on one surface."""
_BORDER = 8.0
_MIN_REACH = 2.0
"""Photo pixels over which the distortion is measured."""


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
class Plan:
    """Which observations are aligned to which, and how their patches are distorted."""

    reference: Int64
    """[W] the observations that others are aligned to."""
    moving: Int64
    """[R] those others."""
    window: Int64
    """[R] which of `reference` each of them is aligned to."""
    affine: Float64
    """[R, 2, 2] from pixels of the reference's photo to those of the observation's."""
    start: Float64
    """[R, 2] where the observation is expected."""
    usable: Bool
    """[R]: the affine map is one that a patch survives."""
    levels: Sequence[float]
    """Photo pixels per pixel of the patches, from coarse to fine."""


def plan_refinement(tracks: Tracks, geometry: Geometry, levels: Sequence[float]) -> Plan:
    """All observations aligned to the most central one of their point."""
    reference, mean = _central_views(tracks, _towards_cameras(tracks, geometry))
    moving = np.delete(np.arange(len(tracks.point)), reference)
    normals = _normals(tracks.points, mean)
    return _planned(tracks, geometry, _Pairs(reference, moving, tracks.point[moving]), normals, levels)


def plan_extension(tracks: Tracks, geometry: Geometry, levels: Sequence[float]) -> tuple[Tracks, Plan]:
    """The points of a model in further images that see them at much the same angle and size as their central view.

    Returns:
        the new observations as expected; the plan, of the tracks with these behind them.
    """
    directions = _towards_cameras(tracks, geometry)
    reference, mean = _central_views(tracks, directions)
    central = directions[reference]

    def alike(image: int, points: Int64, _: Float64) -> Bool:
        towards = geometry.viewing_rays(image, np.zeros((0, 2)))[0] - tracks.points[points]
        cosine = (towards * central[points]).sum(axis=1) / np.linalg.norm(towards, axis=1).clip(min=1e-12)
        return np.asarray(cosine > MIN_VIEW_COSINE, np.bool_)

    expected = _expected(tracks, geometry, alike)
    both = tracks.joined(expected)
    new = np.arange(len(tracks.point), len(both.point))
    plan = _planned(both, geometry, _Pairs(reference, new, expected.point), _normals(tracks.points, mean), levels)
    return expected, _alike(plan)


def plan_completion(tracks: Tracks, geometry: Geometry, sought: Tracks, levels: Sequence[float]) -> Plan:
    """Further observations of the points of a model, aligned to the view of their point that is nearest to them.

    Args:
        tracks: of the model.
        geometry: its cameras.
        sought: at least one observation; each of a point that `tracks` observe.
        levels: of the patches.

    Returns:
        the plan, of the tracks with those that are sought behind them.
    """
    directions = _towards_cameras(tracks, geometry)
    _, mean = _central_views(tracks, directions)
    nearest = _nearest_views(tracks, directions, sought.point, _towards_cameras(sought, geometry))
    reference, window = np.unique(nearest, return_inverse=True)
    both = tracks.joined(sought)
    new = np.arange(len(tracks.point), len(both.point))
    pairs = _Pairs(reference, new, np.asarray(window.ravel(), np.int64))
    return _planned(both, geometry, pairs, _normals(tracks.points, mean), levels)


class _Pairs(NamedTuple):
    """What is aligned to what; see `Plan`."""

    reference: Int64
    moving: Int64
    window: Int64


def _planned(tracks: Tracks, geometry: Geometry, pairs: _Pairs, normals: Float64, levels: Sequence[float]) -> Plan:
    """How patches are distorted on their way.

    Args:
        tracks: of a model.
        geometry: its cameras.
        pairs: of the observations.
        normals: [K, 3] of the surface.
        levels: of the patches.
    """
    affine, start = _transfer(tracks, geometry, pairs, normals, reach=max(levels[0], _MIN_REACH))
    with np.errstate(invalid="ignore"):
        stretch = np.abs(np.linalg.det(affine))
        usable = np.isfinite(affine).all(axis=(1, 2)) & np.isfinite(start).all(axis=1)
        usable &= (stretch > 1 / _MAX_STRETCH) & (stretch < _MAX_STRETCH)
    affine[~usable], start[~usable] = np.eye(2), tracks.xy[pairs.moving[~usable]]
    return Plan(
        reference=pairs.reference,
        moving=pairs.moving,
        window=pairs.window,
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


def _nearest_views(tracks: Tracks, directions: Float64, points: Int64, towards: Float64) -> Int64:
    """[M] the observation that sees each of some points most nearly from a given direction.

    Args:
        tracks: at least one observation of each of the points.
        directions: [O, 3] from the points to the cameras of their observations.
        points: [M].
        towards: [M, 3] the given directions.
    """
    order = np.argsort(tracks.point, kind="stable")
    first = np.searchsorted(tracks.point[order], points)
    count = np.searchsorted(tracks.point[order], points, side="right") - first
    sought = np.repeat(np.arange(len(points)), count)
    step = np.arange(len(sought)) - np.repeat(np.cumsum(count) - count, count)
    view = order[np.repeat(first, count) + step]
    cosine = (directions[view] * towards[sought]).sum(axis=1)
    best = np.lexsort((-cosine, sought))
    nearest: Int64 = view[best[np.r_[True, np.diff(sought[best]) > 0]]]
    return nearest


def seen_beside(tracks: Tracks, geometry: Geometry, radius_px: float) -> Tracks:
    """Points that images do not observe, but next to which they observe another one of the same depth.

    Two pairs of a dense model hit neighbouring pixels of one place, and their tracks do not meet. What an image sees of
    one of them says that it sees the other.

    Args:
        tracks: of a model.
        geometry: its cameras.
        radius_px: photo pixels between an observation and where the other point is expected.

    Returns:
        the same points with the expected observations alone, whose keypoint is -1.
    """

    def beside(image: int, points: Int64, places: Float64) -> Bool:
        mine = tracks.image == image
        distance, nearest = cKDTree(tracks.xy[mine]).query(places)
        observed = tracks.points[tracks.point[mine]][nearest]
        centre, _ = geometry.viewing_rays(image, np.zeros((0, 2)))
        depth, other = (np.linalg.norm(some - centre, axis=1) for some in (tracks.points[points], observed))
        return np.asarray((distance < radius_px) & (np.abs(depth - other) < SAME_DEPTH * other), np.bool_)

    return _expected(tracks, geometry, beside)


def _expected(tracks: Tracks, geometry: Geometry, wanted: Callable[[int, Int64, Float64], Bool]) -> Tracks:
    """Where images should show points that they share with others but did not match.

    Args:
        tracks: of a model.
        geometry: its cameras.
        wanted: of an image, and of [M] points that it should show at [M, 2] pixels, which are sought there [M].
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
        places = geometry.project(one, tracks.points[points])
        inside = ((places > _BORDER) & (places < np.array(geometry.size(one)) - _BORDER)).all(axis=1)
        points, places = points[inside], places[inside]
        sought = wanted(one, points, places)
        point.append(points[sought])
        image.append(np.full(int(sought.sum()), one))
        xy.append(places[sought])
    joined = np.concatenate(point)
    return Tracks(
        points=tracks.points,
        point=joined,
        image=np.concatenate(image),
        keypoint=np.full(len(joined), -1),
        xy=np.concatenate(xy),
    )


def _alike(plan: Plan) -> Plan:
    """The part of a plan in which patches keep about their size."""
    (a, b), (c, d) = plan.affine.transpose(1, 2, 0)
    # The singular values of a 2 × 2 matrix are the sum and the difference of these.
    turned, mirrored = np.hypot(a + d, c - b) / 2, np.hypot(a - d, c + b) / 2
    largest, smallest = turned + mirrored, np.abs(turned - mirrored)
    alike = plan.usable & (largest < MAX_VIEW_STRETCH) & (smallest > 1 / MAX_VIEW_STRETCH)
    return replace(
        plan,
        moving=plan.moving[alike],
        window=plan.window[alike],
        affine=plan.affine[alike],
        start=plan.start[alike],
        usable=plan.usable[alike],
    )


def _towards_cameras(tracks: Tracks, geometry: Geometry) -> Float64:
    """[O, 3] unit directions from each observation's point to its camera."""
    directions = np.empty((len(tracks.point), 3))
    for image, mine in _by_image(tracks.image):
        centre, _ = geometry.viewing_rays(image, np.zeros((0, 2)))
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
    tracks: Tracks, geometry: Geometry, pairs: _Pairs, normals: Float64, reach: float
) -> tuple[Float64, Float64]:
    """How the plane at a point maps the reference's photo to that of a moving observation.

    Args:
        tracks: of the model.
        geometry: its cameras.
        pairs: of observations of the same points.
        normals: [K, 3] of the planes.
        reach: photo pixels over which the map is measured.

    Returns:
        [R, 2, 2] the map's derivative; [R, 2] where it takes the reference's keypoint.
    """
    probes = reach * np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    points, normal = (some[tracks.point[pairs.reference]] for some in (tracks.points, normals))
    on_plane = np.empty((len(pairs.reference), len(probes), 3))
    for image, mine in _by_image(tracks.image[pairs.reference]):
        places = tracks.xy[pairs.reference[mine], None] + probes
        centre, rays = geometry.viewing_rays(image, places.reshape(-1, 2))
        rays = rays.reshape(len(mine), len(probes), 3)
        with np.errstate(divide="ignore", invalid="ignore"):
            depth = ((points[mine] - centre) * normal[mine]).sum(axis=1)[:, None] / (rays @ normal[mine, :, None])[
                ..., 0
            ]
        on_plane[mine] = centre + rays * depth[:, :, None]
    seen = np.empty((len(pairs.moving), len(probes), 2))
    for image, mine in _by_image(tracks.image[pairs.moving]):
        places = geometry.project(image, on_plane[pairs.window[mine]].reshape(-1, 3))
        seen[mine] = places.reshape(len(mine), len(probes), 2)
    affine = np.stack([seen[:, 1] - seen[:, 2], seen[:, 3] - seen[:, 4]], axis=2) / (2 * reach)
    return affine, seen[:, 0]


def _by_image(image: Int64) -> Iterator[tuple[int, Int64]]:
    """Every image with the rows [M] where it stands."""
    order = np.argsort(image, kind="stable")
    found, begins = np.unique(image[order], return_index=True)
    yield from zip(found.tolist(), np.split(order, begins[1:]), strict=bool(len(order)))
