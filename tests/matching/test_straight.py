"""Matches through lenses that are known to distort."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.colmap.lens import Lens
from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.epipolar import sampson_error
from mast3r_sfm.geometry.rigid import angle_between_rotations
from mast3r_sfm.matching.check import EpipolarEdge, Pinhole, Putative, check_pair
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.stage import Matcher
from mast3r_sfm.matching.straight import PairLenses
from mast3r_sfm.progress import SilentProgress
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.types import Camera, Encoding, ImageRecord, PairMatches, Rig
from tests.exact import HEIGHT_PX, WIDTH_PX, Describer, all_pairs, keypoint_source, no_sift, random_pixels, ring

PHOTO_SCALE = 2.0
NUMBER = 4
SCENE = ring(NUMBER, turn_deg=70, points=400, radius=2.4)


def lens() -> Lens:
    """A wide camera of photos twice as large as what the network sees, off centre, and bent by up to 60 pixels."""
    params = PHOTO_SCALE * np.array([600.0, 606.0, WIDTH_PX / 2 + 9, HEIGHT_PX / 2 - 7, 0, 0, 0, 0])
    params[4:] = [-0.35, 0.1, 0.001, -0.002]
    return Lens(
        camera=Camera(
            model="OPENCV",
            width_px=round(PHOTO_SCALE * WIDTH_PX),
            height_px=round(PHOTO_SCALE * HEIGHT_PX),
            params=params,
            focal_is_known=True,
            is_given=True,
        )
    )


class BentDescriber(Describer):
    """Sees the scene through the lens."""

    def encodings(self) -> list[Encoding]:
        """What encoding all images would give: keypoints in bent photo pixels."""
        bent = []
        for encoding in super().encodings():
            # The scene's pixels are those of focal length 600 around the middle; the lens has its own.
            directions = (encoding.xy / PHOTO_SCALE - [WIDTH_PX / 2, HEIGHT_PX / 2]) / SCENE.focal_px
            xy = lens().bend(lens().focal_px * directions + lens().centre_px)
            bent.append(replace(encoding, xy=xy.astype(np.float32)))
        return bent


def matcher(*, known: bool) -> Matcher:
    model = BentDescriber(SCENE, photo_scale=PHOTO_SCALE)
    encodings, config = model.encodings(), MatchConfig(features="model")
    checker = PairChecker(
        model=model,
        encodings=encodings,
        config=config,
        seed=0,
        threads=1,
        lenses=dict.fromkeys(range(NUMBER), lens()) if known else {},
    )
    return Matcher(checker=checker, num_images=NUMBER, detect_sift=no_sift)


def records() -> list[ImageRecord]:
    size = lens().camera.width_px, lens().camera.height_px
    return [
        ImageRecord(name=f"{image}.jpg", width_px=size[0], height_px=size[1], sha256="0", camera_group="wide")
        for image in range(NUMBER)
    ]


def matched(folder: Path, *, known: bool) -> tuple[list[EpipolarEdge], list[PairMatches], Rig]:
    one = matcher(known=known)
    cache = StageCache(folder, "match", str(known), SilentProgress())
    edges, _ = one.check_graph(all_pairs(NUMBER), cache, SilentProgress())
    rig = one.estimate_rig(edges, records(), {"wide": lens().camera} if known else None)
    return edges, one.calibrate(edges, rig), rig


def test_known_distortion_is_taken_out_of_two_view_geometry(tmp_path: Path) -> None:
    edges, matches, rig = matched(tmp_path, known=True)
    assert len(rig.cameras) == 1
    np.testing.assert_array_equal(rig.cameras[0].params, lens().camera.params)
    for match, (first, second) in zip(matches, combinations(range(NUMBER), 2), strict=True):
        both = int((SCENE.sees(first) & SCENE.sees(second)).sum())
        assert match.verdict.has_depth
        assert 0.97 * both <= len(match) <= both
        pose = SCENE.second_from_first(first, second)
        assert np.degrees(angle_between_rotations(match.second_from_first[:, :3], pose[:, :3])) < 0.01
    plain, worse, _ = matched(tmp_path, known=False)
    assert sum(map(len, worse)) < 0.9 * sum(map(len, matches))
    assert sum(edge.num_inliers for edge in plain) < 0.9 * sum(edge.num_inliers for edge in edges)


def test_matches_come_back_in_pixels_of_the_photo(tmp_path: Path) -> None:
    encodings = BentDescriber(SCENE, photo_scale=PHOTO_SCALE).encodings()
    _, matches, _ = matched(tmp_path, known=True)
    places: dict[int, set[tuple[float, float]]] = {image: set() for image in range(NUMBER)}
    for match in matches:
        for image, xy in ((match.first, match.xy_first), (match.second, match.xy_second)):
            offsets = np.linalg.norm(encodings[image].xy.astype(np.float64)[None] - xy[:, None], axis=2)
            assert offsets.min(axis=1).max() < 1e-3
            places[image] |= set(map(tuple, xy.tolist()))
    # A keypoint has one place in all pairs, to the bit: scales of pairs compare by it.
    for image, found in places.items():
        assert len(found) <= len(encodings[image].xy)


def test_edges_are_bent_back() -> None:
    first, second = matcher(known=True).checker.views((0, 1))
    lenses = PairLenses.of((0, 1), (first, second), {0: lens()})
    one = matcher(known=True).checker
    source = keypoint_source(one.encodings, one.config)
    ((edge,),) = replace(one, sources=[source], lenses={0: lens()}).check([(0, 1)])
    bent = lenses.bend(edge)
    np.testing.assert_array_equal(bent.xy_second, edge.xy_second)
    assert np.abs(bent.xy_first - edge.xy_first).max() > 2
    keypoints = first.xy.astype(np.float64) / PHOTO_SCALE
    offsets = np.linalg.norm(keypoints[None] - bent.xy_first[:, None], axis=2).min(axis=1)
    assert offsets.max() < 1e-3
    assert PairLenses.of((0, 1), (first, second), {}).bend(edge).xy_first is edge.xy_first


@pytest.mark.parametrize("given", [True, False])
def test_given_cameras_are_the_rig(given: bool) -> None:
    rig = matcher(known=True).estimate_rig([], records(), {"wide": lens().camera} if given else {})
    (camera,) = rig.cameras
    assert camera.is_given is given
    assert camera.model == ("OPENCV" if given else "SIMPLE_PINHOLE")


def test_known_cameras_leave_chance_less_room() -> None:
    """Of matches that mean nothing, fewer agree with an essential matrix than with a fundamental one."""
    camera = Pinhole(focal_px=600.0, centre_px=np.array([320.0, 240.0]))
    by_chance: dict[bool, list[int]] = {True: [], False: []}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        nonsense = Putative(
            xy_first=random_pixels(rng, 60),
            xy_second=random_pixels(rng, 60),
            confidence=rng.uniform(0.8, 1.0, 60).astype(np.float32),
            is_distinct=np.ones(60, np.bool_),
        )
        for known in by_chance:
            putative = replace(nonsense, cameras=(camera, camera)) if known else nonsense
            by_chance[known].append(check_pair((0, 1), putative, MatchConfig(), seed).num_inliers)
    assert 5 <= np.mean(by_chance[True]) < np.mean(by_chance[False]) - 1


def test_known_cameras_find_the_true_geometry() -> None:
    putative, is_true = SCENE.putative(0, 1, outliers=0.5, noise_px=0.3)
    camera = Pinhole(focal_px=600.0, centre_px=np.array([320.0, 240.0]))
    edge = check_pair((0, 1), replace(putative, cameras=(camera, camera)), MatchConfig(), 0)
    assert edge.verdict.is_link
    error = sampson_error(edge.fundamental, putative.xy_first[is_true], putative.xy_second[is_true])
    assert np.quantile(error, 0.99) < 1.5
    essential = camera.matrix.T @ edge.fundamental @ camera.matrix
    values = np.linalg.svd(essential, compute_uv=False)
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert values[2] < 1e-6 * values[0]
