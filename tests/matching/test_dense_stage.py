"""The match stage with a model that decodes pairs in batches: which pairs go together, and whose answer is whose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock, get_ident

import numpy as np
import pytest
import torch

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.matching import checker, rounds
from mast3r_sfm.matching.check import EpipolarEdge, Putative, check_pair
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.stage import Matcher
from mast3r_sfm.models.base import DenseModel
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.types import (
    Bool,
    Encoding,
    Float64,
    LoadedImage,
    PairPrediction,
    PixelTransform,
    Preparation,
    Verdict,
    ViewPrediction,
)
from tests.exact import Listener, all_pairs, no_sift
from tests.scenes import facade_views, load, oracle

SIZES = [(8, 6), (6, 8), (8, 6), (8, 6), (6, 8), (8, 6)]
PIXELS = 48
POINTS = torch.randn(PIXELS, 3, generator=torch.Generator().manual_seed(0))


class Numbered:
    """Sees in every image the same pixels in the same order, and is as sure of a pair as the pair's numbers say."""

    name = "numbered"
    fingerprint = "0" * 64
    retrieval_tokens = 1
    token_channels = 1
    images_at_once = 1
    preparation = Preparation(size_px=8)

    def __init__(self, pairs_at_once: int) -> None:
        self.pairs_at_once = pairs_at_once
        self.batches: list[list[tuple[int, int]]] = []
        self._lock = Lock()

    def encode(self, images: Sequence[LoadedImage]) -> list[Encoding]:
        """Not used: there are no pixels."""
        raise NotImplementedError(len(images))

    def predict(
        self, pairs: Sequence[tuple[Encoding, Encoding]]
    ) -> Iterator[tuple[int, PairPrediction, PairPrediction]]:
        """Last pair first."""
        numbers = [(int(first.tokens[0, 0]), int(second.tokens[0, 0])) for first, second in pairs]
        with self._lock:
            self.batches.append(numbers)
        for row in reversed(range(len(pairs))):
            sure = sureness(*numbers[row])
            yield row, self._prediction(pairs[row], sure), self._prediction(pairs[row][::-1], -1.0)

    def _prediction(self, pair: tuple[Encoding, Encoding], sure: float) -> PairPrediction:
        first, second = (self._view(encoding.network_size, sure) for encoding in pair)
        return PairPrediction(first=first, second=second)

    def _view(self, size: tuple[int, int], sure: float) -> ViewPrediction:
        shape = size[::-1]
        return ViewPrediction(
            descriptors=torch.eye(PIXELS).reshape(*shape, PIXELS),
            descriptor_confidence=torch.full(shape, sure),
            points_at=lambda index: (POINTS[index], torch.ones(len(index))),
        )


def sureness(first: int, second: int) -> float:
    return 10.0 * first + second + 1


class Encodings(Sequence[Encoding]):
    """Notes which thread reads them."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return len(SIZES)

    def __getitem__(self, index):
        self.threads.add(get_ident())
        return Encoding(
            tokens=np.full((1, 1), index, np.float16),
            xy=np.zeros((1, 2), np.float32),
            attention=np.ones(1, np.float32),
            transform=PixelTransform(matrix=np.eye(2, 3)),
            network_size=SIZES[index],
        )


def make_matcher(model: Numbered, encodings: Encodings, threads: int) -> Matcher:
    own = PairChecker(model=model, encodings=encodings, config=MatchConfig(), seed=0, threads=threads)
    return Matcher(checker=own, num_images=len(SIZES), detect_sift=no_sift)


@pytest.mark.parametrize("at_once", [1, 2, 4, 100])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_pair_gets_its_own_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, threads: int
) -> None:
    given: dict[tuple[int, int], Putative] = {}

    def note(pair: tuple[int, int], putative: Putative, config: MatchConfig, seed: int) -> EpipolarEdge:
        given[pair] = putative
        return check_pair(pair, putative, config, seed)

    monkeypatch.setattr(checker, "check_pair", note)
    monkeypatch.setattr(rounds, "PAIRS_PER_CHUNK", 10)
    model, encodings, listener = Numbered(at_once), Encodings(), Listener()
    assert isinstance(model, DenseModel)
    matcher = make_matcher(model, encodings, threads)
    cache = StageCache(tmp_path, "match", "key", listener)
    graph = all_pairs(len(SIZES))
    edges, resumed = matcher.check_graph(graph, cache, listener)
    assert resumed == 0
    assert (listener.steps, listener.finished) == (15, 1)
    assert [(edge.first, edge.second) for edge in edges] == [tuple(pair) for pair in graph.pairs.tolist()]
    for (first, second), putative in given.items():
        assert len(putative.xy_first) == PIXELS
        np.testing.assert_allclose(putative.confidence, sureness(first, second))
        flat = [
            (xy[:, 1] - 0.5) * SIZES[image][0] + xy[:, 0] - 0.5
            for image, xy in ((first, putative.xy_first), (second, putative.xy_second))
        ]
        np.testing.assert_allclose(flat[0], flat[1])
        np.testing.assert_allclose(np.sort(flat[0]), np.arange(PIXELS))

    # Each batch is of one shape and no larger than the model wants it, and not smaller than it need be.
    assert sorted(pair for batch in model.batches for pair in batch) == sorted(given)
    for batch in model.batches:
        assert len({(SIZES[first], SIZES[second]) for first, second in batch}) == 1
        assert len(batch) <= at_once
    if at_once >= 4:
        assert len(model.batches) <= 4 + 4  # of each chunk, at most one batch for each two shapes in their order
    # Stored encodings are read by one thread, that which hands out the work.
    assert encodings.threads == {get_ident()}

    again, resumed = matcher.check_graph(graph, cache, listener)
    assert resumed == 2
    assert [edge.num_putative for edge in again] == [PIXELS] * 15


def test_an_error_of_the_model_ends_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Numbered(2)

    def fail(pairs: object) -> object:
        raise ValueError(f"cannot decode {pairs}")

    monkeypatch.setattr(model, "predict", fail)
    matcher = make_matcher(model, Encodings(), 2)
    with pytest.raises(ValueError, match="cannot decode"):
        matcher.check_graph(all_pairs(6), StageCache(tmp_path, "match", "key", Listener()), Listener())


def test_no_match_of_a_dense_model_lies_in_a_masked_pixel() -> None:
    views = facade_views(3)
    model = oracle(views)
    encodings = model.encode(load(views))

    def usable(image: int, xy: Float64) -> Bool:
        return xy[:, 0] > (40 if image == 1 else 60)

    plain = PairChecker(model=model, encodings=encodings, config=MatchConfig(), seed=0, threads=1)
    masked = replace(plain, usable=usable)
    for pair in ((0, 1), (1, 2)):
        edges = [next(iter(checker.check([pair])))[0] for checker in (plain, masked)]
        seen = [usable(pair[0], edge.xy_first) & usable(pair[1], edge.xy_second) for edge in edges]
        assert 0.2 < seen[0].mean() < 0.8
        assert seen[1].all()
        assert edges[1].verdict is Verdict.GOOD
        assert edges[1].points_first is not None
        assert len(edges[1].points_first) == len(seen[1]) > 0.8 * seen[0].sum()
