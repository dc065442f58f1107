"""What `match.features` means: which keypoints are matched on which pairs, and that a resumed run ends the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.matching import rounds
from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.hard import SMALL_PART
from mast3r_sfm.matching.putative import KeypointSource
from mast3r_sfm.matching.stage import Matcher
from mast3r_sfm.models.base import PairModel
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.storage.encodings import NumberedEncodings
from mast3r_sfm.types import Encoding, Float64, PixelTransform, Verdict, ViewGraph
from tests.exact import Describer, Listener, Scene, all_pairs, no_sift, ring
from tests.scenes import facade_views, load, oracle

NUMBER = SMALL_PART + 3
"""One part that is large enough to stand by itself, and one that is not."""


class Sift:
    """Stands for SIFT, and notes for which images it is asked."""

    def __init__(self, encodings: Sequence[Encoding]) -> None:
        self._encodings = encodings
        self.asked: list[list[int]] = []

    def __call__(self, images: Sequence[int]) -> KeypointSource:
        self.asked.append(list(images))
        chosen = NumberedEncodings(images, [self._encodings[image] for image in images])
        return KeypointSource(encodings=chosen, min_similarity=0.8, max_ratio=0.8)


class SlowDescriber(Describer):
    """Notes whether its slow matcher is asked; it finds nothing."""

    asked = 0

    def match_hard(self, first: Encoding, second: Encoding) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        self.asked += 1
        return super().match_hard(first, second)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return ring(NUMBER, turn_deg=90, points=200)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "PAIRS_PER_CHUNK", 16)


def blinded(encodings: list[Encoding], images: Sequence[int]) -> list[Encoding]:
    """In some images, the descriptors say nothing."""
    rng = np.random.default_rng(9)
    given = list(encodings)
    for image in images:
        tokens = rng.normal(size=given[image].tokens.shape)
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        given[image] = replace(given[image], tokens=tokens.astype(np.float16))
    return given


def moved(scene: Scene, by: float) -> Scene:
    """Other points of the same place, so that each keypoint says of which kind it is."""
    return replace(scene, points=scene.points + by)


class Setup:
    """A matcher of a scene with keypoints of two kinds."""

    def __init__(self, scene: Scene, features: str, blind: Sequence[int] = ()) -> None:
        self.scene, self.features = scene, features
        self.model = SlowDescriber(scene)
        self.encodings = blinded(self.model.encodings(), blind)
        self.sift = Sift(Describer(moved(scene, 0.05), seed=7).encodings())

    def matcher(self, detect: Callable[[Sequence[int]], KeypointSource] | None = None) -> Matcher:
        config = MatchConfig(features=self.features)  # type: ignore[arg-type]
        checker = PairChecker(model=self.model, encodings=self.encodings, config=config, seed=0, threads=2)
        return Matcher(checker=checker, num_images=NUMBER, detect_sift=detect or self.sift)

    def run(self, folder: Path, **values: Callable[[Sequence[int]], KeypointSource]) -> tuple[list[EpipolarEdge], int]:
        cache = StageCache(folder, "match", "key", Listener())
        return self.matcher(**values).check_graph(all_pairs(NUMBER), cache, Listener())

    def kinds(self, edge: EpipolarEdge) -> tuple[int, int]:
        """How many inliers are keypoints of the model's, and of SIFT's."""
        counts = []
        for own in (self.scene, moved(self.scene, 0.05)):
            distance = np.abs(edge.xy_first[:, None] - own.project(edge.first)).max(axis=2)
            counts.append(int((distance.min(axis=1, initial=np.inf) < 1e-3).sum()))
        return counts[0], counts[1]


def assert_equal(one: Sequence[EpipolarEdge], two: Sequence[EpipolarEdge]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        for entry in fields(left):
            np.testing.assert_array_equal(getattr(left, entry.name), getattr(right, entry.name), err_msg=entry.name)


def test_model_alone(scene: Scene, tmp_path: Path) -> None:
    setup = Setup(scene, "model", blind=(0, 1))
    edges, _ = setup.run(tmp_path, detect=no_sift)
    for edge in edges:
        own, sift = setup.kinds(edge)
        assert sift == 0
        assert edge.verdict.is_link == (edge.first > 1)
        assert (own > 100) == (edge.first > 1)
    assert setup.model.asked > 0


def test_sift_alone(scene: Scene, tmp_path: Path) -> None:
    setup = Setup(scene, "sift")
    edges, _ = setup.run(tmp_path)
    assert setup.sift.asked == [list(range(NUMBER))]
    for edge in edges:
        own, sift = setup.kinds(edge)
        assert own == 0
        assert sift > 100
        assert edge.verdict is Verdict.GOOD


def test_sift_alone_asks_the_model_for_nothing(scene: Scene, tmp_path: Path) -> None:
    """Not even for its slow matcher where nothing hangs together."""
    setup = Setup(scene, "sift")
    setup.sift = Sift(blinded(Describer(scene).encodings(), range(NUMBER)))
    edges, _ = setup.run(tmp_path)
    assert not any(edge.verdict.is_link for edge in edges)
    assert setup.model.asked == 0


def test_both(scene: Scene, tmp_path: Path) -> None:
    setup = Setup(scene, "both", blind=(0,))
    edges, _ = setup.run(tmp_path)
    assert setup.sift.asked == [list(range(NUMBER))]
    for edge in edges:
        own, sift = setup.kinds(edge)
        assert sift > 100
        assert (own > 100) == (edge.first > 0)
        assert own + sift == len(edge.xy_first)
        assert edge.verdict is Verdict.GOOD


def test_auto_leaves_sift_out_where_all_hangs_together(scene: Scene, tmp_path: Path) -> None:
    setup = Setup(scene, "auto")
    edges, _ = setup.run(tmp_path, detect=no_sift)
    assert all(setup.kinds(edge)[1] == 0 and edge.verdict is Verdict.GOOD for edge in edges)
    assert_equal(edges, Setup(scene, "model").run(tmp_path / "model")[0])


def test_auto_asks_for_sift_where_the_connection_hangs(scene: Scene, tmp_path: Path) -> None:
    setup = Setup(scene, "auto", blind=(4,))
    edges, _ = setup.run(tmp_path)
    assert setup.sift.asked == [list(range(NUMBER))]  # all pairs of image 4 hang
    for edge in edges:
        own, sift = setup.kinds(edge)
        hangs = 4 in (edge.first, edge.second)
        assert (own == 0, sift > 100) == (hangs, hangs)
        assert edge.verdict is Verdict.GOOD
    assert setup.model.asked == 0  # SIFT has joined what hung


def test_auto_asks_for_the_images_of_hanging_pairs_only(scene: Scene, tmp_path: Path) -> None:
    setup = Setup(scene, "auto", blind=(4,))
    graph = all_pairs(NUMBER)
    pairs = graph.pairs[[4 not in pair or 2 in pair or 9 in pair for pair in graph.pairs.tolist()]]
    few = ViewGraph(num_images=NUMBER, pairs=pairs, score=graph.score[: len(pairs)], reason=graph.reason[: len(pairs)])
    edges, _ = setup.matcher().check_graph(few, StageCache(tmp_path, "match", "key", Listener()), Listener())
    assert setup.sift.asked == [[2, 4, 9]]
    assert [(edge.first, edge.second) for edge in edges] == [tuple(pair) for pair in pairs.tolist()]
    assert all(edge.verdict is Verdict.GOOD for edge in edges)


@pytest.mark.parametrize("features", ["model", "sift", "both", "auto"])
def test_a_resumed_run_has_the_same_edges(scene: Scene, tmp_path: Path, features: str) -> None:
    edges, resumed = Setup(scene, features, blind=(4, 5)).run(tmp_path)
    assert resumed == 0
    again = Setup(scene, features, blind=(4, 5))
    found, resumed = again.run(tmp_path)
    assert resumed == 4 + (features != "sift")
    assert_equal(found, edges)
    assert again.model.asked == 0
    if features in ("model", "auto"):
        assert again.sift.asked == []


@pytest.mark.parametrize("left", [0, 2, 4])
@pytest.mark.parametrize("features", ["auto", "both"])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not(scene: Scene, tmp_path: Path, features: str, left: int) -> None:
    """With some chunks of pairs; the hanging ones were not settled yet."""
    edges, _ = Setup(scene, features, blind=(4, 5)).run(tmp_path)
    chunks = sorted(tmp_path.rglob("*.safetensors"))
    assert len(chunks) == 5
    for chunk in chunks[left:]:
        chunk.unlink()
    found, resumed = Setup(scene, features, blind=(4, 5)).run(tmp_path)
    assert resumed == left
    assert_equal(found, edges)


def true_keypoints() -> tuple[list[Encoding], Float64]:
    """What both views of the façade show of 200 pixels of the first, and where these are in space, in its frame."""
    first, second, *_ = facade_views().values()
    rng = np.random.default_rng(2)
    height, width = first.depth.shape
    pixels = rng.permutation(height * width)[:400]
    rows, columns = np.divmod(pixels, width)
    world = first.points_world[rows, columns]
    local = world @ second.cam_from_world[:, :3].T + second.cam_from_world[:, 3]
    seen = local @ second.K.T
    xy_second = seen[:, :2] / seen[:, 2:]
    inside = ((xy_second > 1) & (xy_second < [width - 1, height - 1])).all(axis=1)
    xy_first = np.stack([columns, rows], axis=1) + 0.5
    names = rng.normal(size=(400, 32))
    names /= np.linalg.norm(names, axis=1, keepdims=True)
    encodings = [
        Encoding(
            tokens=names[inside][:200].astype(np.float16),
            xy=xy[inside][:200].astype(np.float32),
            attention=np.ones(200, np.float32),
            transform=PixelTransform(matrix=np.eye(2, 3)),
            network_size=(width, height),
        )
        for xy in (xy_first, xy_second)
    ]
    in_first = world @ first.cam_from_world[:, :3].T + first.cam_from_world[:, 3]
    return encodings, in_first[inside][:200]


def check_facade(folder: Path, features: str, sift: Callable[[Sequence[int]], KeypointSource]) -> EpipolarEdge:
    """Two views of it, by the oracle."""
    views = dict(list(facade_views().items())[:2])
    model: PairModel = oracle(views)
    config = MatchConfig(features=features)  # type: ignore[arg-type]
    checker = PairChecker(model=model, encodings=model.encode(load(views)), config=config, seed=0, threads=2)
    matcher = Matcher(checker=checker, num_images=2, detect_sift=sift)
    ((edge, *_), _) = matcher.check_graph(all_pairs(2), StageCache(folder, "match", "key", Listener()), Listener())
    return edge


def test_a_pointmap_model_gives_points_to_the_matches_of_sift(tmp_path: Path) -> None:
    encodings, places = true_keypoints()
    sift = Sift(encodings)
    edge = check_facade(tmp_path, "both", sift)
    assert sift.asked == [[0, 1]]
    assert edge.verdict is Verdict.GOOD
    assert edge.points_first is not None
    assert edge.points_second is not None
    assert len(edge.points_first) == len(edge.points_second) == len(edge.xy_first) > 1000
    # Of SIFT are those that do not end at the middle of a pixel.
    of_sift = np.flatnonzero(np.abs(edge.xy_second % 1 - 0.5).max(axis=1) > 1e-3)
    assert 150 < len(of_sift) <= 200
    distance = np.abs(edge.xy_first[of_sift][:, None] - encodings[0].xy).max(axis=2)
    assert distance.min(axis=1).max() < 1e-6
    points, truth = edge.points_first[of_sift], places[distance.argmin(axis=1)]
    scale = np.median(truth[:, 2] / points[:, 2])
    error = np.linalg.norm(scale * points - truth, axis=1)
    assert np.median(error) < 1e-3 * np.median(truth[:, 2])
    plain = check_facade(tmp_path / "plain", "model", no_sift)
    assert len(plain.xy_first) + len(of_sift) == pytest.approx(len(edge.xy_first), rel=0.02)


def test_a_pointmap_model_is_matched_alone_unless_told_otherwise(tmp_path: Path) -> None:
    one = check_facade(tmp_path / "auto", "auto", no_sift)
    assert_equal([one], [check_facade(tmp_path / "model", "model", no_sift)])


def test_sift_instead_of_a_pointmap_model(tmp_path: Path) -> None:
    encodings, _ = true_keypoints()
    edge = check_facade(tmp_path, "sift", Sift(encodings))
    assert edge.verdict is Verdict.GOOD
    assert edge.points_first is None
    assert 150 < len(edge.xy_first) <= 200
