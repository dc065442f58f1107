"""Random points in front of pinhole cameras, with exact correspondences: truth for the stages after the models.

    from tests.exact import ring

    scene = ring(8)                     # eight cameras around a cloud of points
    scene.matches(0, 1)                 # the verified pair that a perfect matcher would find
    scene.putative(0, 1, outliers=0.3)  # the same before any check, best first by confidence

Nothing occludes anything: a camera sees every point that falls into its image. Pixels are network pixels; `photo_scale`
photo pixels make one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.rigid import (
    camera_centre,
    compose_poses,
    invert_pose,
    make_pose,
    rotation_from_axis_angle,
    transform_points,
)
from mast3r_sfm.matching.check import Putative
from mast3r_sfm.matching.putative import KeypointSource
from mast3r_sfm.progress import SilentProgress
from mast3r_sfm.synthetic.cameras import look_at
from mast3r_sfm.types import (
    Camera,
    Encoding,
    Float64,
    LoadedImage,
    PairMatches,
    PixelTransform,
    Preparation,
    Reason,
    Rig,
    Verdict,
    ViewGraph,
)

WIDTH_PX, HEIGHT_PX = 640, 480
CENTRE_PX = np.array([WIDTH_PX / 2, HEIGHT_PX / 2])


@dataclass(frozen=True, kw_only=True)
class Scene:
    """World points [K, 3] and the cameras [N, 3, 4] that look at them, all of one focal length."""

    points: Float64
    poses: Float64
    focal_px: float = 600.0

    def project(self, image: int) -> Float64:
        """[K, 2] network pixels of all points."""
        local = transform_points(self.poses[image], self.points)
        return self.focal_px * local[:, :2] / local[:, 2:] + CENTRE_PX

    def sees(self, image: int) -> NDArray[np.bool_]:
        """[K] points in front of the camera and inside its image."""
        xy = self.project(image)
        in_front = transform_points(self.poses[image], self.points)[:, 2] > 0.1
        return in_front & (xy >= 0).all(axis=1) & (xy <= [WIDTH_PX, HEIGHT_PX]).all(axis=1)

    def second_from_first(self, first: int, second: int) -> Float64:
        """[3, 4] true relative pose."""
        return compose_poses(self.poses[second], invert_pose(self.poses[first]))

    def putative(
        self, first: int, second: int, *, outliers: float = 0.0, noise_px: float = 0.0, seed: int = 0
    ) -> tuple[Putative, NDArray[np.bool_]]:
        """Matches before any check, in random order, and which of them are true."""
        rng = np.random.default_rng([seed, first, second])
        seen = np.flatnonzero(self.sees(first) & self.sees(second))
        one, two = self.project(first)[seen], self.project(second)[seen]
        one, two = one + noise_px * rng.normal(size=one.shape), two + noise_px * rng.normal(size=two.shape)
        wrong = round(len(seen) * outliers / (1 - outliers))
        xy_first = np.concatenate([one, random_pixels(rng, wrong)])
        xy_second = np.concatenate([two, random_pixels(rng, wrong)])
        is_true = np.arange(len(xy_first)) < len(seen)
        order = rng.permutation(len(xy_first))
        confidence = rng.uniform(0.8, 1.0, len(xy_first)).astype(np.float32)
        putative = Putative(
            xy_first=xy_first[order],
            xy_second=xy_second[order],
            confidence=confidence,
            is_distinct=np.ones(len(xy_first), np.bool_),
        )
        return putative, is_true[order]

    def matches(self, first: int, second: int, *, scale: float = 1.0, photo_scale: float = 1.0) -> PairMatches:
        """The pair as a perfect check would judge it, in a scale of its own."""
        seen = np.flatnonzero(self.sees(first) & self.sees(second))
        pose = self.second_from_first(first, second)
        return PairMatches(
            first=first,
            second=second,
            xy_first=photo_scale * self.project(first)[seen],
            xy_second=photo_scale * self.project(second)[seen],
            confidence=np.ones(len(seen), np.float32),
            points_first=scale * transform_points(self.poses[first], self.points[seen]),
            points_second=scale * transform_points(self.poses[second], self.points[seen]),
            verdict=Verdict.GOOD,
            inlier_ratio=0.9,
            second_from_first=make_pose(pose[:, :3], scale * pose[:, 3]),
        )

    def rig(self, *, photo_scale: float = 1.0, focal_factor: float = 1.0) -> Rig:
        """One shared camera whose focal length is off by a factor."""
        params = photo_scale * np.array([focal_factor * self.focal_px, *CENTRE_PX])
        size = round(photo_scale * WIDTH_PX), round(photo_scale * HEIGHT_PX)
        camera = Camera(model="SIMPLE_PINHOLE", width_px=size[0], height_px=size[1], params=params)
        return Rig(cameras=(camera,), camera_of_image=np.zeros(len(self.poses), np.int32))


def random_pixels(rng: np.random.Generator, count: int) -> Float64:
    """[count, 2] anywhere in the image."""
    return rng.uniform([0, 0], [WIDTH_PX, HEIGHT_PX], (count, 2))


def ring(number: int, *, points: int = 300, seed: int = 0, turn_deg: float = 360.0, radius: float = 5.0) -> Scene:
    """Cameras on an uneven circle, or on a part of it, around a cloud of points."""
    rng = np.random.default_rng([seed, 17])
    cloud = rng.uniform(-1.2, 1.2, (points, 3))
    angles = np.radians(turn_deg) * (np.arange(number) + rng.uniform(-0.2, 0.2, number)) / number
    height = rng.uniform(-0.8, 0.8, number)
    places = np.stack([radius * np.sin(angles), height, -radius * np.cos(angles)], axis=1)
    return Scene(points=cloud, poses=np.stack([look_at(place, rng.normal(0, 0.2, 3)) for place in places]))


def wandering(number: int, seed: int) -> Scene:
    """A ring whose cameras do not look at one point: axes that meet would leave two focal lengths open."""
    scene = ring(number, turn_deg=120, seed=seed)
    rng = np.random.default_rng([seed, 5])
    return replace(
        scene,
        poses=np.stack(
            [look_at(camera_centre(pose), rng.normal(0, 0.6, 3), rng.normal(0, 0.3)) for pose in scene.poses]
        ),
    )


def turning(number: int, *, points: int = 2000, seed: int = 0, step_deg: float = 8.0) -> Scene:
    """Cameras in one point that turn: no depth."""
    rng = np.random.default_rng([seed, 18])
    directions = rng.normal(size=(points, 3))
    cloud = directions / np.linalg.norm(directions, axis=1, keepdims=True) * rng.uniform(2, 9, (points, 1))
    place = rng.normal(size=3)
    angles = np.radians(step_deg) * np.arange(number)
    targets = place + np.stack([np.sin(angles), rng.uniform(-0.05, 0.05, number), np.cos(angles)], axis=1)
    return Scene(points=cloud + place, poses=np.stack([look_at(place, target) for target in targets]))


def wall(number: int, *, points: int = 300, seed: int = 0) -> Scene:
    """Cameras on an arc in front of one plane."""
    scene = ring(number, points=points, seed=seed, turn_deg=60.0)
    return replace(scene, points=2 * scene.points * np.array([1.0, 1.0, 0.0]))


def street(number: int, *, points: int = 1500, seed: int = 0) -> Scene:
    """Cameras that move straight forward between points on both sides."""
    rng = np.random.default_rng([seed, 19])
    cloud = rng.uniform([-6, -4, 2], [6, 2, 40], (points, 3))
    places = np.stack([np.zeros(number), np.zeros(number), 0.8 * np.arange(number)], axis=1)
    return Scene(points=cloud, poses=np.stack([look_at(place, place + np.array([0.0, 0.0, 1.0])) for place in places]))


def turned_wrong(match: PairMatches, rng: np.random.Generator) -> PairMatches:
    """The same pair with a nonsense pose that its points agree with."""
    axis = rng.normal(size=3)
    turn = rotation_from_axis_angle(axis / np.linalg.norm(axis) * rng.uniform(0.6, 3.0))
    pose = make_pose(turn @ match.second_from_first[:, :3], rng.normal(size=3) * 3)
    return replace(match, second_from_first=pose)


def poses_by_name(images: Sequence[int] | NDArray[np.int32], poses: Float64) -> dict[str, Float64]:
    """Poses as the evaluation takes them."""
    return {f"{int(image):04d}.jpg": pose for image, pose in zip(images, poses, strict=True)}


def centres(poses: Float64) -> Float64:
    """[N, 3]."""
    return camera_centre(poses)


class Describer:
    """A keypoint model by name only: its descriptors tell each point of a scene from every other, with some doubt."""

    name = "describer"
    fingerprint = "0" * 64
    retrieval_tokens = 100
    images_at_once = 1
    preparation = Preparation(size_px=max(WIDTH_PX, HEIGHT_PX))

    def __init__(self, scene: Scene, *, photo_scale: float = 1.0, strangers: int = 0, seed: int = 0) -> None:
        self._scene, self._photo_scale, self._strangers, self._seed = scene, photo_scale, strangers, seed
        self._names = np.random.default_rng([seed, 3]).normal(size=(len(scene.points), 64))

    def encode(self, images: Sequence[LoadedImage]) -> list[Encoding]:
        """Not used: there are no pixels."""
        raise NotImplementedError(len(images))

    def encodings(self) -> list[Encoding]:
        """What encoding all images would give."""
        return [self._encoding(image) for image in range(len(self._scene.poses))]

    def match_hard(self, first: Encoding, second: Encoding) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Finds nothing."""
        del first, second
        return np.zeros((0, 2), np.int64), np.zeros(0, np.float32)

    def _encoding(self, image: int) -> Encoding:
        rng = np.random.default_rng([self._seed, 4, image])
        seen = np.flatnonzero(self._scene.sees(image))
        tokens = np.concatenate([self._names[seen], rng.normal(size=(self._strangers, 64))])
        tokens += 0.2 * rng.normal(size=tokens.shape)
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        xy = np.concatenate([self._scene.project(image)[seen], random_pixels(rng, self._strangers)])
        scale = self._photo_scale
        return Encoding(
            tokens=tokens.astype(np.float16),
            xy=(scale * xy).astype(np.float32),
            attention=np.ones(len(xy), np.float32),
            transform=PixelTransform(matrix=np.array([[scale, 0.0, 0.0], [0.0, scale, 0.0]])),
            network_size=(WIDTH_PX, HEIGHT_PX),
        )


def all_pairs(number: int) -> ViewGraph:
    """Every image with every other."""
    pairs = np.array(list(combinations(range(number), 2)), np.int32).reshape(-1, 2)
    return ViewGraph(
        num_images=number,
        pairs=pairs,
        score=np.ones(len(pairs), np.float32),
        reason=np.full(len(pairs), Reason.EXHAUSTIVE, np.int32),
    )


def keypoint_source(encodings: Sequence[Encoding] = (), config: MatchConfig | None = None) -> KeypointSource:
    """A model's own keypoints, as the match stage takes them."""
    config = config or MatchConfig()
    return KeypointSource(encodings=encodings, min_similarity=config.min_similarity, max_ratio=config.max_ratio)


def no_sift(images: Sequence[int]) -> KeypointSource:
    """SIFT where it must not be asked for."""
    raise AssertionError(f"SIFT of {images} is not needed")


class Listener(SilentProgress):
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int, str]] = []
        self.steps = 0
        self.finished = 0
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def start(self, stage: str, total: int, unit: str) -> None:
        self.started.append((stage, total, unit))

    def advance(self, steps: int = 1) -> None:
        self.steps += steps

    def finish(self) -> None:
        self.finished += 1

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
