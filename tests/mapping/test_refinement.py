"""Observations moved to where they show what the track's best view shows, on photos whose truth is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from mast3r_sfm.geometry.rigid import camera_centre, compose_poses, make_pose, rotation_from_axis_angle
from mast3r_sfm.mapping.patches import RADIUS
from mast3r_sfm.mapping.planning import (
    MAX_VIEW_STRETCH,
    MIN_SHARED,
    MIN_VIEW_COSINE,
    SAME_DEPTH,
    Geometry,
    _nearest_views,
    seen_beside,
)
from mast3r_sfm.mapping.refinement import MAX_MOVE, MIN_SPACING, Refined, Refiner
from mast3r_sfm.synthetic.cameras import look_at, make_cameras
from mast3r_sfm.synthetic.render import render
from mast3r_sfm.synthetic.scenes import make_scene
from mast3r_sfm.types import Bool, Float32, Float64, Int64, Tracks
from tests.surfaces import Pinholes, Surface, Texture, arc

MARGIN = 22
"""Pixels of the border that keypoints stay away from, so that patches are whole on both levels."""

SeenAt = Callable[[int, Float64], Float64]


@dataclass(frozen=True, kw_only=True)
class Set:
    """Photos, their cameras, and the points [M, 3] that an image shows at pixels [M, 2]."""

    photos: tuple[Float32, ...]
    cameras: Pinholes
    seen_at: SeenAt

    def tracks(self, count: int = 150, *, noise_px: float = 0.7, seed: int = 0) -> Tracks:
        """Random points that the middle image shows, seen by all images whose frame they are in, with noise."""
        rng = np.random.default_rng([seed, 31])
        size = np.array([self.cameras.width_px, self.cameras.height_px])
        middle = len(self.photos) // 2
        points = self.seen_at(middle, rng.uniform([MARGIN, MARGIN], size - MARGIN, (count, 2)))
        rows = []
        for image in range(len(self.photos)):
            xy = self.cameras.project(image, points)
            seen = ((xy > MARGIN) & (xy < size - MARGIN)).all(axis=1)
            rows += [(point, image, *xy[point]) for point in np.flatnonzero(seen)]
        table = np.array(sorted(rows))
        return Tracks(
            points=points + 0.003 * rng.normal(size=points.shape),
            point=table[:, 0].astype(np.int64),
            image=table[:, 1].astype(np.int64),
            keypoint=np.arange(len(table)),
            xy=table[:, 2:] + noise_px * rng.normal(size=(len(table), 2)),
        )

    def refiner(
        self, *, photos: Sequence[Float32] | None = None, pixel_scale: float = 1.0, threads: int = 2
    ) -> Refiner:
        shown = self.photos if photos is None else photos
        return Refiner(load_grey=lambda image: shown[image], pixel_scale=pixel_scale, threads=threads)

    def refine(self, tracks: Tracks, *, geometry: Geometry | None = None, **how: Any) -> Refined:
        return self.refiner(**how).refine(tracks, geometry or self.cameras)

    def extend(self, tracks: Tracks, *, geometry: Geometry | None = None, **how: Any) -> Tracks:
        return self.refiner(**how).extend(tracks, geometry or self.cameras)

    def judge(self, tracks: Tracks, refined: Refined) -> Judgement:
        reference = references(tracks, refined)
        true = np.empty_like(tracks.xy)
        for image in np.unique(tracks.image):
            mine = np.flatnonzero(tracks.image[reference] == image)  # the points that this image is the best view of
            points = np.full_like(tracks.points, np.nan)
            points[mine] = self.seen_at(int(image), tracks.xy[reference[mine]])
            for other in np.unique(tracks.image):
                rows = np.flatnonzero((tracks.image == other) & np.isin(tracks.point, mine))
                true[rows] = self.cameras.project(int(other), points[tracks.point[rows]])
        moving = np.ones(len(true), bool)
        moving[reference] = False
        return Judgement(
            before=np.linalg.norm(tracks.xy - true, axis=1)[moving],
            after=np.linalg.norm(refined.xy - true, axis=1)[moving],
            kept=refined.kept[moving],
            moving=moving,
        )


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Distances [R] of the observations that were aligned from the truth, in pixels."""

    before: Float64
    after: Float64
    kept: Bool
    moving: Bool
    """[O] which they are; the others are the references."""


def references(tracks: Tracks, refined: Refined) -> Int64:
    """[K] the observation of each point that stayed in its place, and was kept: its best view."""
    still = np.flatnonzero((refined.xy == tracks.xy).all(axis=1))
    assert refined.kept[still].all()
    assert tracks.point[still].tolist() == np.unique(tracks.point).tolist()
    return still


def of_surface(surface: Surface, cameras: Pinholes) -> Set:
    return Set(
        photos=tuple(surface.photograph(cameras, image) for image in range(len(cameras.poses))),
        cameras=cameras,
        seen_at=lambda image, xy: surface.seen_at(cameras, image, xy),
    )


@cache
def plane() -> Set:
    return of_surface(Surface(), arc(5))


@cache
def bumps() -> Set:
    """One photo was taken on its side, another upside down."""
    return of_surface(Surface(bumps=0.15), arc(5, rolls=(0.0, np.pi / 2, 0.0, np.pi)))


@cache
def tilted() -> Set:
    """Far from square to the cameras."""
    return of_surface(Surface(slope=0.8), arc(3, turn_deg=40))


@cache
def room() -> Set:
    """The furnished room, with sharp edges, occlusions and shadows; rendered, so with the noise of rounding."""
    scene, cameras = make_scene("room"), make_cameras("room", 7, width_px=288, height_px=216)[2:5]
    photos = [render(scene, camera).image.astype(np.float32).mean(axis=2) for camera in cameras]
    pinholes = Pinholes(
        poses=np.stack([camera.cam_from_world for camera in cameras]),
        focal_px=cameras[0].intrinsics[0, 0],
        width_px=288,
        height_px=216,
    )

    def seen_at(image: int, xy: Float64) -> Float64:
        centre, rays = pinholes.viewing_rays(image, xy)
        points: Float64 = centre + scene.nearest(centre, rays)[0][:, None] * rays
        return points

    return Set(photos=tuple(photos), cameras=pinholes, seen_at=seen_at)


def chosen(tracks: Tracks, rows: Bool) -> Tracks:
    """Some of the observations, with the points that they are of."""
    kept, point = np.unique(tracks.point[rows], return_inverse=True)
    return Tracks(
        points=tracks.points[kept],
        point=point,
        image=tracks.image[rows],
        keypoint=tracks.keypoint[rows],
        xy=tracks.xy[rows],
    )


@pytest.mark.parametrize("made", [plane, bumps, tilted], ids=["plane", "bumps", "tilted"])
def test_observations_come_to_show_the_same_point(made: Callable[[], Set]) -> None:
    tracks = made().tracks()
    before = tracks.xy.copy()
    refined = made().refine(tracks)
    found = made().judge(tracks, refined)
    assert len(found.after) > 250
    assert 0.9 < np.median(found.before) < 1.4  # two keypoints' noise
    assert found.kept.mean() > 0.98
    kept = found.after[found.kept]
    assert 0.001 < np.median(kept) < 0.04
    assert np.quantile(kept, 0.95) < 0.12
    assert kept.max() < 0.4
    np.testing.assert_array_equal(tracks.xy, before)


def test_in_a_room_most_come_to_show_the_same_point() -> None:
    tracks = room().tracks(300)
    found = room().judge(tracks, room().refine(tracks))
    assert len(found.after) > 300
    kept = found.after[found.kept]
    # Random pixels lie on bare walls, along edges and behind things, too.
    assert 0.7 < found.kept.mean() < 0.99
    assert np.median(kept) < 0.2
    assert np.mean(kept < 0.5) > 0.7
    assert np.median(found.before) > 0.9
    assert np.median(found.after[~found.kept]) > 3 * np.median(kept)


def test_the_most_central_view_stays() -> None:
    tracks = bumps().tracks()
    centres = camera_centre(bumps().cameras.poses)
    reference = references(tracks, bumps().refine(tracks))
    towards = centres[tracks.image] - tracks.points[tracks.point]
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    for point, best in enumerate(reference):
        mine = np.flatnonzero(tracks.point == point)
        angles = towards[mine] @ towards[mine].sum(axis=0)
        assert angles.max() == pytest.approx(towards[best] @ towards[mine].sum(axis=0))
    assert len(np.unique(tracks.image[reference])) > 1


def test_light_and_contrast_do_not_matter() -> None:
    tracks = plane().tracks()
    plain = plane().refine(tracks)
    gains, offsets = (1, 0.4, 1, 0.7, 0.9), (0, 90, 0, 20, 9)
    lit = [gain * photo + offset for photo, gain, offset in zip(plane().photos, gains, offsets, strict=True)]
    refined = plane().refine(tracks, photos=[photo.astype(np.float32) for photo in lit])
    np.testing.assert_array_equal(refined.kept, plain.kept)
    # Windows are kept in half precision, to a tenth of a grey value.
    assert np.abs(refined.xy - plain.xy).max() < 0.03
    # Nor does a curve.
    curves = zip(plane().photos, (1, 2, 1, 0.5, 1), strict=True)
    curved = [(255 * (photo / 255) ** gamma).astype(np.float32) for photo, gamma in curves]
    found = plane().judge(tracks, plane().refine(tracks, photos=curved))
    assert found.kept.mean() > 0.98
    assert np.median(found.after) < 0.04


def test_noise_of_the_photos_costs_its_share() -> None:
    rng = np.random.default_rng(0)
    tracks = bumps().tracks()
    grainy = [(photo + 4 * rng.normal(size=photo.shape)).astype(np.float32) for photo in bumps().photos]
    found = bumps().judge(tracks, bumps().refine(tracks, photos=grainy))
    assert found.kept.mean() > 0.97
    assert 0.03 < np.median(found.after[found.kept]) < 0.12


@pytest.mark.parametrize("moved_px", [6.0, 25.0])
def test_a_keypoint_in_a_wrong_place_is_brought_back(moved_px: float) -> None:
    """What the best view shows is looked for where the model says that it is, wherever the keypoint was."""
    tracks = plane().tracks(noise_px=0.3)
    best = references(tracks, plane().refine(tracks))
    wrong = np.setdiff1d(np.arange(len(tracks.xy)), best)[::5]
    xy = tracks.xy.copy()
    xy[wrong] += moved_px * np.array([0.6, 0.8])
    misplaced = replace(tracks, xy=xy)
    refined = plane().refine(misplaced)
    np.testing.assert_array_equal(references(misplaced, refined), best)
    found = plane().judge(misplaced, refined)
    assert found.kept.mean() > 0.98
    assert found.before.max() > moved_px - 2
    assert found.after[found.kept].max() < 0.4


def test_what_another_thing_hides_is_rejected() -> None:
    tracks = plane().tracks()
    card = Surface(texture=Texture(seed=7, shortest=0.075, longest=0.5)).photograph(plane().cameras, 0)
    hidden = plane().photos[0].copy()
    hidden[40:200, 60:200] = card[40:200, 60:200]
    refined = plane().refine(tracks, photos=(hidden, *plane().photos[1:]))
    found = plane().judge(tracks, refined)
    x, y = tracks.xy[found.moving].T
    mine = tracks.image[found.moving] == 0
    behind = mine & (x > 66) & (x < 194) & (y > 46) & (y < 194)
    beside = mine & ((x < 45) | (x > 215) | (y < 25) | (y > 215))
    assert behind.sum() > 25
    assert found.kept[behind].mean() < 0.12
    assert beside.sum() > 25
    assert found.kept[beside].mean() > 0.97
    assert found.kept[~mine].mean() > 0.98


def test_of_another_scene_nothing_is_kept_but_the_best_views() -> None:
    tracks = plane().tracks()
    strangers = [
        Surface(texture=Texture(seed=seed, shortest=0.075)).photograph(plane().cameras, seed) for seed in range(5)
    ]
    found = plane().judge(tracks, plane().refine(tracks, photos=strangers))
    assert found.kept.mean() < 0.08


@pytest.mark.parametrize("value", [0.0, 128.0])
def test_of_blank_photos_nothing_is_kept_but_the_best_views(value: float) -> None:
    tracks = plane().tracks(40)
    blank = [np.full((240, 320), value, np.float32)] * 5
    refined = plane().refine(tracks, photos=blank)
    assert refined.kept.sum() == 40
    assert np.isfinite(refined.xy).all()


class Stripes(Texture):
    """A texture that does not change along y."""

    def __call__(self, places: Float64) -> Float64:
        return super().__call__(places * np.array([1.0, 0.0]))


def test_stripes_do_not_say_where_along_them_a_point_is() -> None:
    stripes = of_surface(Surface(texture=Stripes(shortest=0.075, longest=0.5)), arc(3))
    tracks = stripes.tracks()
    found = stripes.judge(tracks, stripes.refine(tracks))
    assert found.kept.mean() < 0.05


def test_points_off_the_surface_are_not_believed() -> None:
    """Where a point has a wrong depth, its observations are expected in wrong places."""
    tracks = plane().tracks()
    shares = []
    for depth in (0.02, 0.3, 1.0):
        displaced = replace(tracks, points=tracks.points + np.array([0.0, 0.0, depth]))
        refined = plane().refine(displaced)
        found = plane().judge(displaced, refined)
        shares.append(found.kept.mean())
        # What is kept, it is in its true place, but for a few that are alike by chance.
        assert (found.after[found.kept] > 0.5).sum() < 0.06 * len(found.after)
    assert shares[0] > 0.97
    assert shares[1] < 0.6
    assert shares[2] < 0.1


def turned(cameras: Pinholes, image: int, angle: float) -> Pinholes:
    """The same cameras but one, which is taken to look `angle` radians aside."""
    poses = cameras.poses.copy()
    turn = make_pose(rotation_from_axis_angle(np.array([0.0, angle, 0.0])), np.zeros(3))
    poses[image] = compose_poses(turn, poses[image])
    return replace(cameras, poses=poses)


@cache
def large() -> Set:
    """As if matched at a quarter of the photos' size."""
    texture = Texture(shortest=0.025, longest=0.6, waves=20)
    return of_surface(Surface(texture=texture, bumps=0.1), arc(3, focal_px=1040.0, width_px=1040, height_px=390))


def test_the_levels_follow_the_scale_of_matching_and_the_size_of_the_photos() -> None:
    def levels(pixel_scale: float, long_side_px: float = 1e5) -> list[float]:
        blank = Refiner(load_grey=lambda _: np.zeros((1, 1), np.float32), pixel_scale=pixel_scale, threads=1)
        return blank.levels(long_side_px)

    assert levels(1.0) == levels(1.0, 1024) == [2.0, 1.0]
    assert levels(0.3) == [2.0, 1.0]
    assert levels(4.0) == levels(4.0, 4096) == [8.0, 4.0, 2.0, 1.0]
    assert levels(4.0, 3000) == [6.0, 3.0, 1.5, 1.0]
    assert levels(4.0, 1000) == [4.0, 2.0, 1.0]
    assert levels(1.0, 768) == [1.536, 1.0]
    assert levels(1.0, 384) == [1.0, 0.5]
    assert levels(1.0, 100) == [1.0, MIN_SPACING]
    for scale, long_side in product(np.linspace(0.1, 20, 50).tolist(), (50.0, 400.0, 640.0, 1e3, 1e4)):
        found = levels(scale, long_side)
        assert MIN_SPACING <= found[-1] <= 1 <= max(scale, 1) <= found[0] <= 2 * max(scale, 1)
        assert all(1 < one / two <= 3 for one, two in pairwise(found))


def test_large_photos_are_searched_as_far_as_their_matching_was_coarse() -> None:
    tracks = large().tracks(noise_px=2.0)
    geometry = turned(large().cameras, 2, 1.5 * MAX_MOVE / large().cameras.focal_px)
    fine, coarse = (large().refine(tracks, geometry=geometry, pixel_scale=scale) for scale in (1.0, 4.0))
    for refined, good in ((fine, False), (coarse, True)):
        found = large().judge(tracks, refined)
        mine = tracks.image[found.moving] == 2
        assert mine.sum() > 60
        assert (found.kept[mine].mean() > 0.97) == good
        assert found.kept[mine].mean() < 0.06 or good
        assert found.kept[~mine].mean() > 0.9
        if good:
            assert np.median(found.after[found.kept]) < 0.05
            assert np.quantile(found.after[found.kept], 0.95) < 0.2


def test_nothing_moves_farther_than_matching_may_err() -> None:
    tracks = plane().tracks()
    reach = RADIUS * MIN_SPACING  # of so small photos
    assert reach < MAX_MOVE
    for off_px, kept in ((0.7 * reach, 0.9), (1.3 * reach, 0.02)):
        refined = plane().refine(tracks, geometry=turned(plane().cameras, 0, off_px / plane().cameras.focal_px))
        found = plane().judge(tracks, refined)
        share = found.kept[tracks.image[found.moving] == 0].mean()
        assert share > kept if kept > 0.5 else share < kept


def test_neighbours_tell_how_a_surface_lies() -> None:
    """A point alone is taken to face its cameras; on a tilted surface that costs accuracy."""
    tracks = tilted().tracks(60)
    together = tilted().judge(tracks, tilted().refine(tracks))
    alone_after, alone_kept = [], []
    for point in range(60):
        mine = chosen(tracks, tracks.point == point)
        if len(mine.point) > 1:
            found = tilted().judge(mine, tilted().refine(mine))
            alone_after += found.after.tolist()
            alone_kept += found.kept.tolist()
    assert np.mean(alone_kept) < together.kept.mean()
    assert np.median(together.after) < 0.5 * np.median(alone_after)
    assert np.median(alone_after) < 0.5  # the centre is still found


def test_neighbours_that_are_no_surface_do_not_mislead() -> None:
    """Scattered in depth, or in a line, they say nothing of the surface, which is then taken to face its cameras."""
    tracks = plane().tracks(100)
    near = plane().refine(tracks)
    rng = np.random.default_rng(0)
    # Points that no image sees are no part of any track, but thirty nearby points with one observation each are.
    stray = np.repeat(tracks.points, 3, axis=0) + rng.normal(0, 0.15, (300, 3))
    cluttered = Tracks(
        points=np.concatenate([tracks.points, stray]),
        point=np.concatenate([tracks.point, 100 + np.arange(300)]),
        image=np.concatenate([tracks.image, np.zeros(300, np.int64)]),
        keypoint=np.arange(len(tracks.point) + 300),
        xy=np.concatenate([tracks.xy, np.full((300, 2), 100.0)]),
    )
    refined = plane().refine(cluttered)
    rows = slice(len(tracks.point))
    assert refined.kept[rows].mean() > 0.9
    both = refined.kept[rows] & near.kept
    assert np.median(np.linalg.norm(refined.xy[rows][both] - near.xy[both], axis=1)) < 0.05
    assert refined.kept[len(tracks.point) :].all()  # nothing to compare them with
    line = replace(tracks, points=np.outer(np.linspace(-1, 1, 100), [1.0, 0.2, 0.0]))
    assert np.isfinite(plane().refine(line).xy).all()


def test_tracks_of_two() -> None:
    tracks = bumps().tracks()
    pairs = chosen(tracks, np.isin(tracks.image, (2, 4)))
    pairs = chosen(pairs, np.bincount(pairs.point)[pairs.point] == 2)
    refined = bumps().refine(pairs)
    found = bumps().judge(pairs, refined)
    assert len(found.after) == len(pairs.points) > 50
    assert found.kept.mean() > 0.97
    assert np.median(found.after) < 0.05


def test_a_single_observation_stays() -> None:
    tracks = chosen(plane().tracks(), np.arange(len(plane().tracks().point)) == 3)
    refined = plane().refine(tracks)
    np.testing.assert_array_equal(refined.xy, tracks.xy)
    assert refined.kept.tolist() == [True]


def test_no_tracks() -> None:
    none = np.zeros(0, np.int64)
    empty = Tracks(points=np.zeros((0, 3)), point=none, image=none, keypoint=none, xy=np.zeros((0, 2)))
    refined = plane().refine(empty)
    assert refined.xy.shape == (0, 2)
    assert refined.kept.shape == (0,)


@pytest.mark.parametrize(
    "points",
    [
        lambda points, _: points - np.array([0.0, 0.0, 50.0]),
        lambda points, centres: np.tile(centres[0], (len(points), 1)),
        lambda points, _: 1e9 * (points + np.array([0.0, 0.0, 1.0])),
    ],
    ids=["behind all cameras", "in a camera", "at infinity"],
)
def test_impossible_points_do_no_harm(points: Callable[[Float64, Float64], Float64]) -> None:
    """Warnings are errors."""
    tracks = plane().tracks(60)
    centres = camera_centre(plane().cameras.poses)
    refined = plane().refine(replace(tracks, points=points(tracks.points, centres)))
    assert np.isfinite(refined.xy).all()
    assert 60 <= refined.kept.sum() < 0.5 * len(tracks.point)


def test_a_point_behind_one_camera_is_rejected_there_alone() -> None:
    tracks = plane().tracks(60)
    poses = plane().cameras.poses.copy()
    about = make_pose(np.diag([-1.0, 1.0, -1.0]), np.zeros(3))
    poses[0] = compose_poses(about, poses[0])
    found = plane().judge(tracks, plane().refine(tracks, geometry=replace(plane().cameras, poses=poses)))
    mine = tracks.image[found.moving] == 0
    assert mine.sum() > 30
    assert not found.kept[mine].any()
    assert found.kept[~mine].mean() > 0.97


def test_the_same_again_with_any_number_of_threads() -> None:
    tracks = bumps().tracks()
    one, two, five = (bumps().refine(tracks, threads=threads) for threads in (1, 2, 5))
    for other in (two, five):
        np.testing.assert_array_equal(one.xy, other.xy)
        np.testing.assert_array_equal(one.kept, other.kept)


def test_the_order_of_the_observations_does_not_matter() -> None:
    tracks = bumps().tracks(60)
    plain = bumps().refine(tracks)
    order = np.random.default_rng(0).permutation(len(tracks.point))
    shuffled = replace(
        tracks,
        point=tracks.point[order],
        image=tracks.image[order],
        keypoint=tracks.keypoint[order],
        xy=tracks.xy[order],
    )
    refined = bumps().refine(shuffled)
    np.testing.assert_array_equal(refined.kept, plain.kept[order])
    np.testing.assert_allclose(refined.xy, plain.xy[order], atol=1e-3)


def test_only_photos_of_the_model_are_read() -> None:
    """Other models of a run have photos of their own, and each is read a fixed number of times."""
    tracks = plane().tracks(40)
    some = chosen(tracks, np.isin(tracks.image, (1, 3)))
    read: list[int] = []

    def load_grey(image: int) -> Float32:
        read.append(image)
        return plane().photos[image]

    Refiner(load_grey=load_grey, pixel_scale=1.0, threads=1).refine(some, plane().cameras)
    assert set(read) == {1, 3}
    assert len(read) <= 4


def central(tracks: Tracks, cameras: Pinholes) -> Int64:
    """[K] the observation of each point that is nearest to the mean direction of all of its views."""
    towards = camera_centre(cameras.poses)[tracks.image] - tracks.points[tracks.point]
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    best = []
    for point in range(len(tracks.points)):
        mine = np.flatnonzero(tracks.point == point)
        best.append(mine[np.argmax(towards[mine] @ towards[mine].sum(axis=0))])
    return np.array(best)


def places(tracks: Tracks) -> set[tuple[int, int]]:
    """Point and image of every observation."""
    return set(zip(tracks.point.tolist(), tracks.image.tolist(), strict=True))


def angles_deg(tracks: Tracks, cameras: Pinholes, points: Int64, images: Int64) -> Float64:
    """[M] between an image's view of a point and its central one."""
    centres = camera_centre(cameras.poses)
    here = centres[images] - tracks.points[points]
    there = centres[tracks.image[central(tracks, cameras)[points]]] - tracks.points[points]
    cosine = (here * there).sum(axis=1) / np.linalg.norm(here, axis=1) / np.linalg.norm(there, axis=1)
    return np.degrees(np.arccos(cosine.clip(-1, 1)))


def missing(tracks: Tracks, cameras: Pinholes, max_angle_deg: float, border_px: float) -> set[tuple[int, int]]:
    """Points and images that have no observation of them, though they are in the frame, at no more than an angle."""
    size = np.array([cameras.width_px, cameras.height_px])
    some: set[tuple[int, int]] = set()
    for image in np.unique(tracks.image).tolist():
        xy = cameras.project(image, tracks.points)
        inside = np.flatnonzero(((xy > border_px) & (xy < size - border_px)).all(axis=1))
        angle = angles_deg(tracks, cameras, inside, np.full(len(inside), image))
        some |= {(point, image) for point in inside[angle < max_angle_deg].tolist()}
    return some - places(tracks)


def distances(made: Set, tracks: Tracks, found: Tracks) -> Float64:
    """[O] pixels of found observations from where they show what their central view shows."""
    best = central(tracks, made.cameras)
    off = []
    for point, image, xy in zip(found.point, found.image, found.xy, strict=True):
        shown = made.seen_at(int(tracks.image[best[point]]), tracks.xy[best[[point]]])
        off.append(np.linalg.norm(made.cameras.project(int(image), shown)[0] - xy))
    return np.array(off)


def parted(tracks: Tracks, lost: Bool) -> tuple[Tracks, Tracks]:
    """The observations that are not lost, and those that are, of the same points."""
    kept, gone = (
        Tracks(
            points=tracks.points,
            point=tracks.point[rows],
            image=tracks.image[rows],
            keypoint=tracks.keypoint[rows],
            xy=tracks.xy[rows],
        )
        for rows in (~lost, lost)
    )
    return kept, gone


def test_what_is_seen_beside_another_point() -> None:
    """Every second point stands behind the others' surface."""
    whole, cameras = plane().tracks(300, noise_px=0.0), plane().cameras
    tracks, gone = parted(whole, np.random.default_rng(8).random(len(whole.point)) < 0.4)
    is_behind = np.arange(300) % 2 == 1
    points = tracks.points + np.where(is_behind[:, None], [0.0, 0.0, 0.2], 0.0)
    tracks, radius_px = replace(tracks, points=points), 12.0
    found = seen_beside(tracks, cameras, radius_px)
    there, candidates = places(tracks), places(found)
    assert not there & candidates
    assert len(candidates) == len(found.point)
    assert set(found.keypoint.tolist()) == {-1}
    expected = set()
    for image in range(5):
        mine = np.flatnonzero(tracks.image == image)
        depth = np.linalg.norm(points - camera_centre(cameras.poses[image]), axis=1)
        for point, xy in enumerate(cameras.project(image, points)):
            distance = np.linalg.norm(tracks.xy[mine] - xy, axis=1)
            other = depth[tracks.point[mine[distance.argmin()]]]
            inside = ((xy > 8) & (xy < np.array(cameras.size(image)) - 8)).all()
            same = distance.min() < radius_px and abs(depth[point] - other) < SAME_DEPTH * other
            if inside and same and point in tracks.point and (point, image) not in there:
                expected.add((point, image))
    assert candidates == expected
    assert 50 < len(candidates) < 0.6 * len(gone.point)


def test_what_is_seen_beside_another_point_is_found_at_any_angle() -> None:
    """The last image sees every second point; the one before it, at half the angle, none."""
    tracks = plane().tracks(300, noise_px=0.0)
    rows = (tracks.image == 4) & (tracks.point % 2 == 1) | (tracks.image == 3)
    kept, gone = parted(tracks, rows)
    nothing = parted(kept, np.zeros(len(kept.point), np.bool_))[1]
    found = plane().refiner(pixel_scale=8.0).complete(kept, plane().cameras, nothing)
    wide = (gone.image == 4) & np.isin(gone.point, found.point[found.image == 4])
    assert wide.sum() > 20
    assert distances(plane(), kept, found).max() < 1
    assert np.median(distances(plane(), kept, found)) < 0.05


@pytest.mark.parametrize("made", [plane, bumps])
def test_what_was_lost_is_found_again(made: Callable[[], Set]) -> None:
    """At any angle, and with the number that its keypoint has."""
    tracks = made().tracks(noise_px=0.0)
    kept, lost = parted(tracks, tracks.image == 4)
    off = np.random.default_rng(2).normal(size=lost.xy.shape)
    found = made().refiner().complete(kept, made().cameras, replace(lost, xy=lost.xy + off))
    assert len(lost.point) > 100
    assert len(found.point) > 0.95 * len(lost.point)
    row = {keypoint: number for number, keypoint in enumerate(lost.keypoint.tolist())}
    true = np.array([row[keypoint] for keypoint in found.keypoint.tolist()])
    np.testing.assert_array_equal(found.point, lost.point[true])
    assert set(found.image.tolist()) == {4}
    distance = np.linalg.norm(found.xy - lost.xy[true], axis=1)
    assert 0 < np.median(distance) < 0.05
    assert np.quantile(distance, 0.95) < 0.3


def test_what_another_thing_hides_is_not_found_again() -> None:
    tracks = plane().tracks(300, noise_px=0.2)
    kept, lost = parted(tracks, tracks.image == 4)
    card = Surface(texture=Texture(seed=7, shortest=0.075, longest=0.5)).photograph(plane().cameras, 1)
    hidden = plane().photos[4].copy()
    hidden[:, :160] = card[:, :160]
    found = plane().refiner(photos=(*plane().photos[:4], hidden)).complete(kept, plane().cameras, lost)
    behind, beside = (lost.keypoint[side].tolist() for side in (lost.xy[:, 0] < 145, lost.xy[:, 0] > 175))
    again = set(found.keypoint.tolist())
    assert min(len(behind), len(beside)) > 60
    assert len(again & set(behind)) < 0.06 * len(behind)
    assert len(again & set(beside)) > 0.95 * len(beside)


def test_where_nothing_was_lost_no_photo_is_read() -> None:
    tracks = plane().tracks(20)
    kept, lost = parted(tracks, np.zeros(len(tracks.point), np.bool_))

    def no_photo(image: int) -> Float32:
        raise AssertionError(f"photo {image} was read")

    refiner = Refiner(load_grey=no_photo, pixel_scale=1.0, threads=1)
    assert len(refiner.complete(kept, plane().cameras, lost).point) == 0


def test_the_nearest_view_is_the_one_at_the_smallest_angle() -> None:
    rng = np.random.default_rng(5)
    point = rng.permutation(np.repeat(np.arange(20), rng.integers(1, 6, 20)))
    count = len(point)
    tracks = Tracks(
        points=np.zeros((20, 3)),
        point=point,
        image=np.arange(count),
        keypoint=np.arange(count),
        xy=np.zeros((count, 2)),
    )
    directions, towards = rng.normal(size=(count, 3)), rng.normal(size=(50, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    points = rng.integers(0, 20, 50)
    found = _nearest_views(tracks, directions, points, towards)
    for sought, direction, row in zip(points, towards, found, strict=True):
        assert point[row] == sought
        assert directions[row] @ direction == pytest.approx((directions[point == sought] @ direction).max())


def thinned(tracks: Tracks, share: float = 0.3, *, seed: int = 0) -> Tracks:
    """Without some of the observations, but with three of a point at least: of two, both are as central."""
    rng = np.random.default_rng(seed)
    kept = (rng.random(len(tracks.point)) > share) | (tracks.image == 2)
    kept = chosen(tracks, kept)
    return chosen(kept, np.bincount(kept.point)[kept.point] > 2)


MAX_ANGLE_DEG = np.degrees(np.arccos(MIN_VIEW_COSINE))


@pytest.mark.parametrize("made", [plane, bumps], ids=["plane", "bumps"])
def test_what_was_taken_away_is_found_again(made: Callable[[], Set]) -> None:
    tracks = thinned(made().tracks(noise_px=0.2))
    before = tracks.xy.copy()
    found = made().extend(tracks)
    lost = missing(tracks, made().cameras, MAX_ANGLE_DEG - 0.5, MARGIN)
    assert len(lost) > 40
    assert len(places(found) & lost) > 0.9 * len(lost)
    off = distances(made(), tracks, found)
    assert 0.001 < np.median(off) < 0.03
    assert np.quantile(off, 0.95) < 0.1
    assert off.max() < 0.4
    # Nothing is found twice, nor what was there.
    assert len(places(found)) == len(found.point)
    assert not places(found) & places(tracks)
    np.testing.assert_array_equal(found.points, tracks.points)
    assert (found.keypoint == -1).all()
    np.testing.assert_array_equal(tracks.xy, before)
    # Once found, they are not sought again.
    assert not places(made().extend(tracks.joined(found))) & places(found)


def test_only_alike_views_within_the_frame_are_sought() -> None:
    tracks = thinned(plane().tracks(noise_px=0.2))
    found = plane().extend(tracks)
    # Some views are too far aside, and some points out of the frame.
    wide = missing(tracks, plane().cameras, 90, MARGIN)
    assert len(wide) > 1.2 * len(missing(tracks, plane().cameras, MAX_ANGLE_DEG, MARGIN))
    assert places(found) <= missing(tracks, plane().cameras, MAX_ANGLE_DEG + 1e-6, 8)
    assert angles_deg(tracks, plane().cameras, found.point, found.image).max() > 0.9 * MAX_ANGLE_DEG


class Cropped(Pinholes):
    """Cameras that say that their photos end before they do."""

    def size(self, image: int) -> tuple[int, int]:
        width, height = super().size(image)
        return width - 100, height - 60


def test_points_outside_the_frame_or_at_its_border_are_not_sought() -> None:
    tracks = thinned(plane().tracks(400, noise_px=0.2))
    whole = plane().extend(tracks)
    found = plane().extend(tracks, geometry=Cropped(**vars(plane().cameras)))
    assert places(found) < places(whole)
    expected = np.stack(
        [
            plane().cameras.project(image, tracks.points[[point]])[0]
            for point, image in zip(whole.point.tolist(), whole.image.tolist(), strict=True)
        ]
    )
    inside = (expected < [220 - 8, 180 - 8]).all(axis=1)
    # To two steps of float32, which is what products of other batches round to.
    np.testing.assert_allclose(found.xy, whole.xy[inside], rtol=0, atol=2 * np.spacing(np.float32(220)))
    assert inside.sum() > 60
    # Between the border and the frame's end, and beyond it, were some.
    assert ((expected < [220, 180]).all(axis=1) & ~inside).sum() > 2
    assert (expected > [220, 180]).any(axis=1).sum() > 40


@cache
def near_and_far() -> Set:
    """Views along one direction, from ever farther away."""
    centres = [np.array([0.05 * row, 0.02 * row, -4 * far]) for row, far in enumerate((1.0, 1.1, 1.35, 1.7, 2.2))]
    poses = np.stack([look_at(centre, np.zeros(3)) for centre in centres])
    return of_surface(Surface(texture=Texture(shortest=0.15, longest=0.8)), Pinholes(poses=poses))


def test_views_of_another_size_are_not_sought() -> None:
    tracks = near_and_far().tracks(60, noise_px=0.1)
    both = np.isin(tracks.image, (0, 1))
    # Each third point is one that the farther views see, which makes them neighbours of the others.
    some = chosen(tracks, both | (tracks.point % 3 == 0))
    some = chosen(some, np.bincount(some.point)[some.point] > 1)
    found = near_and_far().extend(some)
    best = some.image[central(some, near_and_far().cameras)][found.point]
    distance = np.array([1.0, 1.1, 1.35, 1.7, 2.2])
    ratio = distance[found.image] / distance[best]
    assert (found.image == 2).sum() > 20
    assert ratio.max() < MAX_VIEW_STRETCH
    assert ratio.min() > 1 / MAX_VIEW_STRETCH
    assert not (found.image == 4).any()


def test_a_point_behind_a_camera_is_not_sought_there() -> None:
    """Warnings are errors."""
    tracks = thinned(plane().tracks(noise_px=0.2))
    poses = plane().cameras.poses.copy()
    poses[1] = compose_poses(make_pose(np.diag([-1.0, 1.0, -1.0]), np.zeros(3)), poses[1])
    found = plane().extend(tracks, geometry=replace(plane().cameras, poses=poses))
    assert not (found.image == 1).any()
    assert (found.image == 3).sum() > 20


def test_what_another_thing_hides_is_not_found() -> None:
    tracks = thinned(plane().tracks(300, noise_px=0.2))
    card = Surface(texture=Texture(seed=7, shortest=0.075, longest=0.5)).photograph(plane().cameras, 1)
    hidden = plane().photos[1].copy()
    hidden[40:200, 60:200] = card[40:200, 60:200]
    photos = (plane().photos[0], hidden, *plane().photos[2:])
    found = plane().extend(tracks, photos=photos)
    sought = missing(tracks, plane().cameras, MAX_ANGLE_DEG - 0.5, MARGIN)
    rows = np.array(sorted(point for point, image in sought if image == 1))
    x, y = plane().cameras.project(1, tracks.points[rows]).T
    behind = set(rows[(x > 66) & (x < 194) & (y > 46) & (y < 194)].tolist())
    beside = set(rows[(x < 45) | (x > 215) | (y < 25) | (y > 215)].tolist())
    again = set(found.point[found.image == 1].tolist())
    assert len(behind) > 15
    assert len(behind & again) <= 0.04 * len(behind)
    assert len(beside) > 15
    # Where a point's own best view is the hidden one, it is not found elsewhere either.
    assert len(beside & again) > 0.95 * len(beside)


def test_of_another_scene_or_none_nothing_is_found() -> None:
    tracks = thinned(plane().tracks(noise_px=0.2))
    sought = missing(tracks, plane().cameras, MAX_ANGLE_DEG, MARGIN)
    strangers = [
        Surface(texture=Texture(seed=seed, shortest=0.075)).photograph(plane().cameras, seed) for seed in range(5)
    ]
    assert len(plane().extend(tracks, photos=strangers).point) <= 0.01 * len(sought)
    blank = [np.full((240, 320), 128.0, np.float32)] * 5
    assert len(plane().extend(tracks, photos=blank).point) == 0


@pytest.mark.parametrize(("off_px", "pixel_scale", "good"), [(0.6, 1, True), (1.8, 1, False), (1.8, 4, True)])
def test_what_is_found_must_be_where_the_model_expects_it(off_px: float, pixel_scale: float, good: bool) -> None:
    """Within a pixel of matching."""
    tracks = thinned(plane().tracks(noise_px=0.0))
    wrong = turned(plane().cameras, 1, off_px / plane().cameras.focal_px)
    found = plane().extend(tracks, geometry=wrong, pixel_scale=pixel_scale)
    sought = [(point, image) for point, image in missing(tracks, wrong, MAX_ANGLE_DEG - 0.5, MARGIN) if image == 1]
    assert len(sought) > 20
    share = len(places(found) & set(sought)) / len(sought)
    assert (share > 0.9) if good else (share < 0.1)
    off = distances(plane(), tracks, found)
    assert np.quantile(off, 0.95) < 0.2


@pytest.mark.parametrize("shared", [MIN_SHARED - 1, MIN_SHARED])
def test_images_that_share_few_points_are_not_searched_for_each_others(shared: int) -> None:
    tracks = plane().tracks(noise_px=0.2)
    common = np.flatnonzero(np.bincount(tracks.point) == 5)[:60]
    kept = np.isin(tracks.point, common) & np.isin(tracks.image, (1, 2))
    # All in image 2, and so many in image 1.
    kept &= (tracks.image != 1) | np.isin(tracks.point, common[:shared])
    some = chosen(tracks, kept)
    found = plane().extend(some)
    assert (found.image == 1).all()
    assert len(found.point) == (0 if shared < MIN_SHARED else pytest.approx(60 - shared, abs=3))


def test_where_all_is_seen_no_photo_is_read() -> None:
    def no_photo(image: int) -> Float32:
        raise AssertionError(f"photo {image} was read")

    refiner = Refiner(load_grey=no_photo, pixel_scale=1.0, threads=2)
    tracks = plane().tracks()
    none = np.zeros(0, np.int64)
    empty = Tracks(points=np.zeros((0, 3)), point=none, image=none, keypoint=none, xy=np.zeros((0, 2)))
    for given in (chosen(tracks, np.bincount(tracks.point)[tracks.point] == 5), empty):
        found = refiner.extend(given, plane().cameras)
        assert found.points.shape == given.points.shape
        assert (found.point.shape, found.image.shape, found.keypoint.shape) == ((0,), (0,), (0,))
        assert found.xy.shape == (0, 2)
        assert len(given.joined(found).point) == len(given.point)


def test_where_no_view_is_alike_nothing_is_found() -> None:
    """Something is in the frame, but seen from too far aside."""
    tracks = plane().tracks(noise_px=0.2)
    apart = chosen(tracks, np.isin(tracks.image, (0, 4)) & ((tracks.image == 0) | (tracks.point % 2 == 0)))
    assert len(missing(apart, plane().cameras, 90, MARGIN)) > 20
    found = plane().extend(apart)
    assert len(found.point) == 0
    assert found.xy.shape == (0, 2)


def test_the_same_is_found_with_any_number_of_threads() -> None:
    tracks = thinned(bumps().tracks(noise_px=0.2))
    one, two, five = (bumps().extend(tracks, threads=threads) for threads in (1, 2, 5))
    assert len(one.point) > 40
    for other in (two, five):
        for name in ("point", "image", "keypoint", "xy"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_photos_outside_the_model_are_not_searched() -> None:
    tracks = thinned(plane().tracks(noise_px=0.2))
    some = chosen(tracks, np.isin(tracks.image, (1, 2)))
    read: list[int] = []

    def load_grey(image: int) -> Float32:
        read.append(image)
        return plane().photos[image]

    found = Refiner(load_grey=load_grey, pixel_scale=1.0, threads=1).extend(some, plane().cameras)
    assert set(found.image.tolist()) <= {1, 2}
    assert len(found.point) > 20
    assert set(read) == {1, 2}
    assert len(read) <= 4


def lines_hidden(image: int, xy: Float64) -> Bool:
    """Every fourth column of every image but the first may not be used."""
    return (np.floor(xy[:, 0]) % 4 != 0) | (image == 0)


def test_what_comes_to_lie_in_a_masked_pixel_is_not_believed() -> None:
    tracks = plane().tracks()
    free, masked = (
        plane().refine(tracks),
        replace(plane().refiner(), usable=lines_hidden).refine(tracks, plane().cameras),
    )
    moved = (free.xy != tracks.xy).any(axis=1)
    hidden = np.zeros(len(moved), np.bool_)
    for image in np.unique(tracks.image).tolist():
        mine = tracks.image == image
        hidden[mine] = ~lines_hidden(image, free.xy[mine])
    np.testing.assert_array_equal(masked.xy, free.xy)
    np.testing.assert_array_equal(masked.kept, free.kept & ~(hidden & moved))
    assert (free.kept & hidden & moved).sum() > 50


def test_further_observations_are_not_looked_for_in_masked_pixels() -> None:
    few = thinned(plane().tracks(noise_px=0.0))
    free = plane().extend(few)
    masked = replace(plane().refiner(), usable=lines_hidden).extend(few, plane().cameras)
    seen = np.array([lines_hidden(int(i), xy[None])[0] for i, xy in zip(free.image, free.xy, strict=True)])
    assert 0.1 < (~seen).mean() < 0.5
    np.testing.assert_array_equal(masked.xy, free.xy[seen])
    np.testing.assert_array_equal(masked.point, free.point[seen])


def test_nothing_is_found_outside_of_a_photo() -> None:
    made = plane()
    tracks = made.tracks(noise_px=0.0)
    size = np.array([made.cameras.width_px, made.cameras.height_px])
    # The photos lose their right and lower parts, so that patches are sought at and beyond the border.
    cut = [photo[: int(size[1]) - 40, : int(size[0]) - 40] for photo in made.photos]
    refined = made.refine(tracks, photos=cut)
    moved = (refined.xy != tracks.xy).any(axis=1)
    inside = (refined.xy < size - 40).all(axis=1)
    assert (tracks.xy >= size - 40).any(axis=1).sum() > 20
    assert not (refined.kept & moved & ~inside).any()
    assert (refined.kept & moved & inside).sum() > 100
