"""Pairs matched and checked, several at a time: the workers of the match stage."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from mast3r_sfm.colmap.lens import Lens
from mast3r_sfm.config import MatchConfig
from mast3r_sfm.matching.check import EpipolarEdge, Putative, check_pair
from mast3r_sfm.matching.fine import FineMatcher
from mast3r_sfm.matching.putative import (
    KeypointSource,
    PointsAt,
    join_putative,
    match_dense,
    match_keypoints,
    nearest_pixels,
    pair_points,
)
from mast3r_sfm.matching.straight import PairLenses
from mast3r_sfm.models.base import DenseModel, PairModel
from mast3r_sfm.types import Encoding, PairPrediction, Usable

_DENSE_WORKERS = 4
"""While the network decodes some pairs, this many threads less one check what it found before; each keeps a few pairs'
decoded tokens in memory."""

Pair = tuple[int, int]
Views = tuple[Encoding, Encoding]


@dataclass(frozen=True, kw_only=True)
class PairChecker:
    """Matches pairs by all there is to match them by, and checks them."""

    model: PairModel
    encodings: Sequence[Encoding]
    """The model's; edges are given in the pixels that it saw."""
    config: MatchConfig
    seed: int
    threads: int
    sources: Sequence[KeypointSource] = ()
    """All kinds of keypoints to match; a dense model's own matches come on top."""
    fine: FineMatcher | None = None
    """Matches links of a dense model once more, at full resolution."""
    lenses: Mapping[int, Lens] = field(default_factory=dict)
    """Of the images whose cameras are known: their edges are in straight pixels."""
    usable: Usable | None = None
    """Says where a dense model's matches may lie; keypoints come without those that a mask hides."""

    def check(self, pairs: Sequence[Pair]) -> Generator[list[EpipolarEdge]]:
        """The edges of all pairs, each once, as they get finished; encodings are read by the calling thread alone.

        Closed early, it waits for what has begun and begins nothing more.
        """
        dense = self.model if isinstance(self.model, DenseModel) and self.config.features != "sift" else None
        workers = self.threads if dense is None else min(self.threads, _DENSE_WORKERS)
        tasks = self._keypoint_tasks(pairs) if dense is None else self._dense_tasks(dense, pairs)
        with ThreadPoolExecutor(workers) as pool:
            yield from _ordered(pool, tasks, 2 * workers)

    def views(self, pair: Pair) -> Views:
        """The model's encodings of a pair; not for several threads at once."""
        return self.encodings[pair[0]], self.encodings[pair[1]]

    def keypoints(self, pair: Pair) -> list[Views]:
        """The keypoints of a pair by source; not for several threads at once."""
        return [(source.encodings[pair[0]], source.encodings[pair[1]]) for source in self.sources]

    def match(self, pixels: Views, keypoints: Sequence[Views]) -> Putative:
        """The matches of all keypoints of a pair."""
        return join_putative(
            [match_keypoints(views, source, pixels) for views, source in zip(keypoints, self.sources, strict=True)]
        )

    def _keypoint_tasks(self, pairs: Sequence[Pair]) -> Iterator[Callable[[], list[EpipolarEdge]]]:
        for pair in pairs:
            yield partial(self._check_keypoints, pair, self.views(pair), self.keypoints(pair))

    def _check_keypoints(self, pair: Pair, pixels: Views, keypoints: Sequence[Views]) -> list[EpipolarEdge]:
        putative = PairLenses.of(pair, pixels, self.lenses).straighten(self.match(pixels, keypoints))
        return [check_pair(pair, putative, self.config, self.seed)]

    def _dense_tasks(self, model: DenseModel, pairs: Sequence[Pair]) -> Iterator[Callable[[], list[EpipolarEdge]]]:
        sizes: dict[tuple[tuple[int, int], ...], list[Pair]] = {}
        for pair in pairs:
            sizes.setdefault(tuple(self.encodings[image].network_size for image in pair), []).append(pair)
        for alike in sizes.values():
            for start in range(0, len(alike), model.pairs_at_once):
                some = alike[start : start + model.pairs_at_once]
                views, keypoints = [self.views(pair) for pair in some], [self.keypoints(pair) for pair in some]
                yield partial(self._check_dense, model, some, views, keypoints)

    def _check_dense(
        self, model: DenseModel, pairs: Sequence[Pair], views: Sequence[Views], keypoints: Sequence[Sequence[Views]]
    ) -> list[EpipolarEdge]:
        found = [
            (
                number,
                self._match_dense(pairs[number], (forward, backward), views[number]),
                pair_points((forward, backward)),
            )
            for number, forward, backward in model.predict(views)
        ]
        edges = []
        for number, putative, points_at in found:
            if self.sources:
                others = self.match(views[number], keypoints[number])
                putative = _with_points(join_putative([putative, others]), views[number], points_at)
            lenses = PairLenses.of(pairs[number], views[number], self.lenses)
            edge = check_pair(pairs[number], lenses.straighten(putative), self.config, self.seed)
            edges.append(edge if self.fine is None else self.fine.refine(edge, views[number], points_at, lenses))
        return edges

    def _match_dense(self, pair: Pair, orders: tuple[PairPrediction, PairPrediction], views: Views) -> Putative:
        putative = match_dense(orders, *views)
        if self.usable is None:
            return putative
        seen = [
            self.usable(image, xy * view.transform.scale)
            for image, xy, view in zip(pair, (putative.xy_first, putative.xy_second), views, strict=True)
        ]
        return putative.subset(seen[0] & seen[1])


def _with_points(putative: Putative, views: Views, points_at: PointsAt) -> Putative:
    first, second = (
        nearest_pixels(xy * view.transform.scale, view)
        for xy, view in zip((putative.xy_first, putative.xy_second), views, strict=True)
    )
    return replace(putative, points=lambda numbers: points_at(first[numbers], second[numbers]))


def _ordered(
    pool: ThreadPoolExecutor, tasks: Iterator[Callable[[], list[EpipolarEdge]]], ahead: int
) -> Iterator[list[EpipolarEdge]]:
    """Results in the order of the tasks; no more than `ahead` tasks are made before they are needed."""
    waiting = []
    for task in tasks:
        waiting.append(pool.submit(task))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
