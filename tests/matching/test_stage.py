"""The match stage: chunks that are found again, edges in order, one camera per group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.matching import checker, rounds
from mast3r_sfm.matching.check import EpipolarEdge, MatchedPoints, check_pair
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.stage import Matcher
from mast3r_sfm.matching.stored import pack_edges, unpack_edges
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.types import Encoding, ImageRecord, PairMatches, Verdict
from tests.exact import Describer, Listener, Scene, all_pairs, no_sift, ring

NUMBER = 6
MODEL = MatchConfig(features="model")


@pytest.fixture(scope="module")
def scene() -> Scene:
    return ring(NUMBER, turn_deg=100, points=200)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifteen pairs in four chunks."""
    monkeypatch.setattr(rounds, "PAIRS_PER_CHUNK", 4)


def make_matcher(scene: Scene, *, photo_scale: float = 1.0, threads: int = 2) -> Matcher:
    model = Describer(scene, strangers=100, photo_scale=photo_scale)
    return matcher_of(model, model.encodings(), MODEL, threads)


def matcher_of(model: Describer, encodings: list[Encoding], config: MatchConfig, threads: int = 2) -> Matcher:
    own = PairChecker(model=model, encodings=encodings, config=config, seed=0, threads=threads)
    return Matcher(checker=own, num_images=len(encodings), detect_sift=no_sift)


def records(number: int = NUMBER, **values: object) -> list[ImageRecord]:
    record = ImageRecord(name="0.jpg", width_px=1280, height_px=960, sha256="0" * 64)
    return [replace(record, name=f"{index}.jpg", **values) for index in range(number)]


def assert_equal(one: Sequence[object], two: Sequence[object]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        for entry in fields(left):  # type: ignore[arg-type]
            np.testing.assert_array_equal(getattr(left, entry.name), getattr(right, entry.name))


def check(matcher: Matcher, folder: Path, listener: Listener | None = None) -> tuple[list[EpipolarEdge], int]:
    listener = listener or Listener()
    return matcher.check_graph(all_pairs(NUMBER), StageCache(folder, "match", "key", listener), listener)


def test_edges_come_in_the_order_of_the_graph(scene: Scene, tmp_path: Path) -> None:
    listener = Listener()
    edges, resumed = check(make_matcher(scene), tmp_path, listener)
    assert [(edge.first, edge.second) for edge in edges] == [tuple(pair) for pair in all_pairs(NUMBER).pairs.tolist()]
    assert resumed == 0
    assert listener.started == [("match", 15, "pair")]
    assert listener.steps == 15
    assert listener.finished == 1
    assert all(edge.verdict is Verdict.GOOD for edge in edges)


def test_a_second_run_reads_what_the_first_wrote(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = make_matcher(scene)
    edges, _ = check(matcher, tmp_path)
    monkeypatch.setattr(checker, "check_pair", None)  # any work would fail
    listener = Listener()
    again, resumed = check(matcher, tmp_path, listener)
    assert resumed == 5  # four of pairs, and the whole once settled
    assert listener.steps == 15
    assert listener.warnings == []
    assert_equal(edges, again)


def test_a_truncated_chunk_is_done_again(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = make_matcher(scene)
    edges, _ = check(matcher, tmp_path)
    chunks = sorted(tmp_path.rglob("*.safetensors"))
    assert len(chunks) == 5
    chunks[1].write_bytes(chunks[1].read_bytes()[:-100])
    done = []
    monkeypatch.setattr(checker, "check_pair", lambda pair, *rest: done.append(pair) or check_pair(pair, *rest))
    listener = Listener()
    again, resumed = check(matcher, tmp_path, listener)
    assert resumed == 4
    assert sorted(done) == [(0, 5), (1, 2), (1, 3), (1, 4)]
    assert len(listener.warnings) == 1
    assert chunks[1].name in listener.warnings[0]
    assert_equal(edges, again)


@pytest.mark.parametrize("threads", [1, 8])
def test_threads_change_nothing(scene: Scene, tmp_path: Path, threads: int) -> None:
    edges, _ = check(make_matcher(scene), tmp_path / "two")
    assert_equal(edges, check(make_matcher(scene, threads=threads), tmp_path / "other")[0])


def test_packing_and_unpacking_is_the_identity(scene: Scene) -> None:
    config = MatchConfig()
    mixed = []
    for number, (count, with_points) in enumerate([(0, False), (200, True), (5, True), (150, False), (200, True)]):
        putative, _ = scene.putative(0, 1, seed=number)
        if with_points:
            points = np.random.default_rng(number).normal(size=(len(putative.xy_first), 3))
            angle = 0.5 * number
            putative = replace(
                putative,
                points=lambda chosen, points=points, angle=angle: MatchedPoints(
                    first=points[chosen], second=-points[chosen], decode_disagreement_deg=angle
                ),
            )
        mixed.append(check_pair((number, number + 1), putative.subset(np.arange(count)), config, 0))
    mixed.append(replace(mixed[0], first=7, second=9, verdict=Verdict.WATERMARK))
    assert {edge.verdict for edge in mixed} == {Verdict.GOOD, Verdict.TOO_FEW, Verdict.WATERMARK}
    assert {edge.decode_disagreement_deg for edge in mixed} == {0.0, 0.5, 2.0}
    back = unpack_edges(pack_edges(mixed))
    for edge, found in zip(mixed, back, strict=True):
        assert (edge.points_first is None) == (found.points_first is None)
        assert found.verdict is edge.verdict
        assert found.xy_first.dtype == np.float64
        assert found.confidence.dtype == np.float32
    assert_equal(mixed, back)


def estimate(matcher: Matcher, photos: Sequence[ImageRecord], folder: Path) -> tuple[list[PairMatches], list[float]]:
    edges, _ = check(matcher, folder)
    rig = matcher.estimate_rig(edges, photos)
    return matcher.calibrate(edges, rig), [camera.params[0] for camera in rig.cameras]


def test_photos_twice_as_large_have_twice_the_focal_length(scene: Scene, tmp_path: Path) -> None:
    matches, focal_px = estimate(make_matcher(scene, photo_scale=2.0), records(), tmp_path)
    assert focal_px == [pytest.approx(1200, rel=0.02)]
    for match in matches:
        assert match.verdict is Verdict.GOOD
        truth = scene.second_from_first(match.first, match.second)
        np.testing.assert_allclose(match.second_from_first[:, :3], truth[:, :3], atol=0.03)
        expected = 2 * scene.project(match.first)
        distance = np.linalg.norm(match.xy_first[:, None] - expected, axis=2).min(axis=1)
        assert (distance < 1e-3).mean() > 0.9


def test_the_exif_focal_length_is_taken_as_it_is(scene: Scene, tmp_path: Path) -> None:
    matcher = make_matcher(scene, photo_scale=2.0)
    edges, _ = check(matcher, tmp_path)
    rig = matcher.estimate_rig(edges, records(exif_focal_px=1234.0))
    assert len(rig.cameras) == 1
    assert rig.cameras[0].focal_is_known
    np.testing.assert_allclose(rig.cameras[0].params, [1234, 640, 480])
    assert (rig.cameras[0].width_px, rig.cameras[0].height_px) == (1280, 960)


def test_each_group_has_its_camera(scene: Scene, tmp_path: Path) -> None:
    matcher = make_matcher(scene, photo_scale=2.0)
    edges, _ = check(matcher, tmp_path)
    photos = [
        replace(record, camera_group="phone" if index % 2 else "drone", exif_focal_px=None if index % 2 else 1200.0)
        for index, record in enumerate(records())
    ]
    rig = matcher.estimate_rig(edges, photos)
    np.testing.assert_array_equal(rig.camera_of_image, [0, 1, 0, 1, 0, 1])  # by name: drone, phone
    assert [camera.focal_is_known for camera in rig.cameras] == [True, False]
    assert [camera.params[0] for camera in rig.cameras] == [1200.0, pytest.approx(1200, rel=0.02)]


def test_photos_that_share_nothing_give_no_links(tmp_path: Path) -> None:
    encodings: list[Encoding] = []
    for seed in range(NUMBER):
        encodings += Describer(ring(1, seed=seed), strangers=300, seed=seed).encodings()
    model = Describer(ring(1))
    matcher = matcher_of(model, encodings, MatchConfig(min_similarity=-1.0, features="model"))
    matches, _ = estimate(matcher, records(), tmp_path)
    assert len(matches) == 15
    assert not any(match.verdict.is_link for match in matches)
    assert all(len(match) == 0 for match in matches)
