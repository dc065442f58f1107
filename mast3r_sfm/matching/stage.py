"""The match stage: every edge of the view graph is matched, checked, calibrated and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.matching.calibrated import View, calibrate_pair
from mast3r_sfm.matching.check import EpipolarEdge, check_pair
from mast3r_sfm.matching.fine import FineMatcher
from mast3r_sfm.matching.focal import estimate_focal_ratios
from mast3r_sfm.matching.hard import match_hard_pair, settle_hanging_pairs
from mast3r_sfm.matching.putative import match_dense, match_keypoints, pair_points
from mast3r_sfm.matching.turns import settle_turns
from mast3r_sfm.models.base import DenseModel, KeypointModel, PairModel
from mast3r_sfm.progress import Progress, steps
from mast3r_sfm.storage.cache import Arrays, StageCache
from mast3r_sfm.types import Camera, Encoding, Float64, ImageRecord, PairMatches, Rig, Verdict, ViewGraph

CODE_VERSION = 3
PAIRS_PER_CHUNK = 64
_DENSE_WORKERS = 4
"""While the network decodes some pairs, this many threads less one check what it found before; each keeps a few pairs'
decoded tokens in memory."""


@dataclass(frozen=True, kw_only=True)
class Matcher:
    """Everything the match stage works with."""

    model: PairModel
    encodings: Sequence[Encoding]
    config: MatchConfig
    seed: int
    threads: int
    fine: FineMatcher | None = None
    """Matches links of a dense model once more, at full resolution."""

    def check_graph(self, graph: ViewGraph, cache: StageCache, progress: Progress) -> tuple[list[EpipolarEdge], int]:
        """Match and check all pairs, chunk by chunk.

        Returns:
            one edge per pair of the graph, in its order, and the number of chunks found finished.
        """
        edges: list[EpipolarEdge] = []
        resumed = 0
        workers = min(self.threads, _DENSE_WORKERS) if isinstance(self.model, DenseModel) else self.threads
        with steps(progress, "match", len(graph.pairs), "pair"), ThreadPoolExecutor(workers) as pool:
            for chunk, start in enumerate(range(0, len(graph.pairs), PAIRS_PER_CHUNK)):
                pairs = [(int(i), int(j)) for i, j in graph.pairs[start : start + PAIRS_PER_CHUNK]]
                stored = cache.read(chunk)
                if stored is not None:
                    edges += _unpack(stored[0])
                    resumed += 1
                    progress.advance(len(pairs))
                    continue
                found: dict[tuple[int, int], EpipolarEdge] = {}
                for some in _ordered(pool, self._tasks(pairs), 2 * workers):
                    found.update({(edge.first, edge.second): edge for edge in some})
                    progress.advance(len(some))
                done = [found[pair] for pair in pairs]
                cache.write(chunk, _pack(done))
                edges += done
            if edges and isinstance(self.model, KeypointModel):
                stored = cache.read(chunks := -(-len(graph.pairs) // PAIRS_PER_CHUNK))
                if stored is not None:
                    return _unpack(stored[0]), resumed + 1
                edges = self._settle_hanging(edges, graph.num_images, self.model, pool)
                cache.write(chunks, _pack(edges))
        return edges, resumed

    def _settle_hanging(
        self, edges: list[EpipolarEdge], num_images: int, model: KeypointModel, pool: ThreadPoolExecutor
    ) -> list[EpipolarEdge]:
        reading = Lock()

        def rematch(number: int) -> EpipolarEdge:
            pair = edges[number].first, edges[number].second
            with reading:
                views = self.encodings[pair[0]], self.encodings[pair[1]]
            return match_hard_pair(model, pair, views, self.config, self.seed)

        return settle_hanging_pairs(edges, num_images, rematch, pool)

    def _tasks(self, pairs: list[tuple[int, int]]) -> Iterator[Callable[[], list[EpipolarEdge]]]:
        """What the pool does, a few pairs at a time; encodings are read here, in one thread."""
        if not isinstance(self.model, DenseModel):
            for pair in pairs:
                yield partial(self._check_keypoints, pair, (self.encodings[pair[0]], self.encodings[pair[1]]))
            return
        sizes: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = {}
        for pair in pairs:
            sizes.setdefault(tuple(self.encodings[image].network_size for image in pair), []).append(pair)
        for alike in sizes.values():
            for start in range(0, len(alike), self.model.pairs_at_once):
                some = alike[start : start + self.model.pairs_at_once]
                yield partial(
                    self._check_dense, self.model, some, [(self.encodings[i], self.encodings[j]) for i, j in some]
                )

    def _check_keypoints(self, pair: tuple[int, int], views: tuple[Encoding, Encoding]) -> list[EpipolarEdge]:
        return [check_pair(pair, match_keypoints(*views, self.config), self.config, self.seed)]

    def _check_dense(
        self, model: DenseModel, pairs: list[tuple[int, int]], views: list[tuple[Encoding, Encoding]]
    ) -> list[EpipolarEdge]:
        putative = [
            (number, match_dense((forward, backward), *views[number]), pair_points((forward, backward)))
            for number, forward, backward in model.predict(views)
        ]
        edges = []
        for number, matches, points_at in putative:
            edge = check_pair(pairs[number], matches, self.config, self.seed)
            edges.append(edge if self.fine is None else self.fine.refine(edge, views[number], points_at))
        return edges

    def calibrate(self, edges: Sequence[EpipolarEdge], rig: Rig) -> list[PairMatches]:
        """Relative pose, points and verdict of every edge, given the cameras."""
        views: dict[int, View] = {}
        for image in {index for edge in edges for index in (edge.first, edge.second)}:
            views[image] = _view(self.encodings[image], rig.cameras[rig.camera_of_image[image]])
        with ThreadPoolExecutor(self.threads) as pool:
            judged = pool.map(
                lambda edge: calibrate_pair(edge, views[edge.first], views[edge.second], self.config, self.seed), edges
            )
            return settle_turns(list(judged), len(rig.camera_of_image))

    def estimate_rig(self, edges: Sequence[EpipolarEdge], records: Sequence[ImageRecord]) -> Rig:
        """One camera per group of photos: focal length from EXIF, else from the edges; centred, without distortion."""
        groups = sorted({record.camera_group for record in records})
        camera_of_image = np.array([groups.index(record.camera_group) for record in records], np.int32)
        sizes = np.array([(record.width_px, record.height_px) for record in records], np.float64)
        scales = np.array([encoding.transform.scale for encoding in self.encodings])
        known = np.full(len(groups), np.nan)
        for camera, record in zip(camera_of_image, records, strict=True):
            if record.exif_focal_px is not None:
                known[camera] = record.exif_focal_px / max(record.width_px, record.height_px)
        ratios = estimate_focal_ratios(list(edges), camera_of_image, sizes / scales[:, None], known)
        cameras = []
        for camera, _ in enumerate(groups):
            width, height = sizes[int(np.flatnonzero(camera_of_image == camera)[0])]
            params = np.array([ratios[camera] * max(width, height), width / 2, height / 2])
            cameras.append(
                Camera(
                    model="SIMPLE_PINHOLE",
                    width_px=int(width),
                    height_px=int(height),
                    params=params,
                    focal_is_known=not np.isnan(known[camera]),
                )
            )
        return Rig(cameras=tuple(cameras), camera_of_image=camera_of_image)


def _view(encoding: Encoding, camera: Camera) -> View:
    scale = encoding.transform.scale
    # Stored photo pixels, scaled: see putative.network_xy.
    return View(focal_px=float(camera.params[0]) / scale, centre_px=camera.params[1:3] / scale, scale=scale)


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


_VERDICTS = list(Verdict)


def _pack(edges: list[EpipolarEdge]) -> Arrays:
    none: Float64 = np.zeros((0, 3))
    points = [(edge.points_first, edge.points_second) for edge in edges]
    return {
        "pairs": np.array([(edge.first, edge.second) for edge in edges], np.int32).reshape(-1, 2),
        "length": np.array([len(edge.xy_first) for edge in edges], np.int64),
        "has_points": np.array([first is not None for first, _ in points], np.bool_),
        "xy_first": np.concatenate([edge.xy_first for edge in edges]),
        "xy_second": np.concatenate([edge.xy_second for edge in edges]),
        "confidence": np.concatenate([edge.confidence for edge in edges]),
        "points_first": np.concatenate([none if first is None else first for first, _ in points]),
        "points_second": np.concatenate([none if second is None else second for _, second in points]),
        "fundamental": np.stack([edge.fundamental for edge in edges]),
        "homography": np.stack([edge.homography for edge in edges]),
        "homography_share": np.array([edge.homography_share for edge in edges]),
        "num_putative": np.array([edge.num_putative for edge in edges], np.int64),
        "verdict": np.array([_VERDICTS.index(edge.verdict) for edge in edges], np.int32),
    }


def _unpack(arrays: Arrays) -> list[EpipolarEdge]:
    ends = np.cumsum(arrays["length"])
    point_ends = np.cumsum(arrays["length"] * arrays["has_points"])
    edges = []
    for row, end in enumerate(ends):
        part = slice(int(end - arrays["length"][row]), int(end))
        has_points = bool(arrays["has_points"][row])
        points = slice(int(point_ends[row] - arrays["length"][row]), int(point_ends[row]))
        edges.append(
            EpipolarEdge(
                first=int(arrays["pairs"][row, 0]),
                second=int(arrays["pairs"][row, 1]),
                xy_first=arrays["xy_first"][part],
                xy_second=arrays["xy_second"][part],
                confidence=arrays["confidence"][part],
                points_first=arrays["points_first"][points] if has_points else None,
                points_second=arrays["points_second"][points] if has_points else None,
                fundamental=arrays["fundamental"][row],
                homography=arrays["homography"][row],
                homography_share=float(arrays["homography_share"][row]),
                num_putative=int(arrays["num_putative"][row]),
                verdict=_VERDICTS[int(arrays["verdict"][row])],
            )
        )
    return edges
