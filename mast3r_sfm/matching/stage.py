"""The match stage: every edge of the view graph is matched, checked, calibrated and judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np

from mast3r_sfm.matching.calibrated import View, calibrate_pair
from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.matching.checker import Pair, PairChecker
from mast3r_sfm.matching.focal import estimate_focal_ratios
from mast3r_sfm.matching.hard import hanging_pairs, match_hard_pair, settle_hanging_pairs
from mast3r_sfm.matching.putative import KeypointSource
from mast3r_sfm.matching.stored import pack_edges, unpack_edges
from mast3r_sfm.matching.turns import settle_turns
from mast3r_sfm.models.base import KeypointModel
from mast3r_sfm.progress import Progress, steps
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.types import Camera, Encoding, ImageRecord, PairMatches, Rig, ViewGraph

CODE_VERSION = 5
PAIRS_PER_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Matcher:
    """Everything the match stage works with."""

    checker: PairChecker
    """How all pairs are matched."""
    num_images: int
    detect_sift: Callable[[Sequence[int]], KeypointSource]
    """Gives the SIFT keypoints of some images."""

    def check_graph(self, graph: ViewGraph, cache: StageCache, progress: Progress) -> tuple[list[EpipolarEdge], int]:
        """Match and check all pairs, chunk by chunk; then once more, harder, those on which the connection hangs.

        Returns:
            one edge per pair of the graph, in its order, and the number of chunks found finished.
        """
        edges: list[EpipolarEdge] = []
        resumed = 0
        checker = replace(self.checker, sources=self._sources(graph))
        pairs = [(int(i), int(j)) for i, j in graph.pairs]
        chunks = range(0, len(pairs), PAIRS_PER_CHUNK)
        with steps(progress, "match", len(pairs), "pair"):
            for chunk, start in enumerate(chunks):
                some = pairs[start : start + PAIRS_PER_CHUNK]
                stored = cache.read(chunk)
                if stored is not None:
                    edges += unpack_edges(stored[0])
                    resumed += 1
                    progress.advance(len(some))
                    continue
                done = _check_all(checker, some, progress)
                cache.write(chunk, pack_edges(done))
                edges += done
        if edges and isinstance(checker.model, KeypointModel) and checker.config.features != "sift":
            stored = cache.read(len(chunks))
            if stored is not None:
                return unpack_edges(stored[0]), resumed + 1
            edges = self._settle_hanging(edges, checker, checker.model, progress)
            cache.write(len(chunks), pack_edges(edges))
        return edges, resumed

    def _sources(self, graph: ViewGraph) -> list[KeypointSource]:
        """The keypoints that all pairs are matched by."""
        config, sources = self.checker.config, []
        if config.features in ("sift", "both") and len(graph.pairs):
            sources.append(self.detect_sift(np.unique(graph.pairs).tolist()))
        if config.features != "sift" and isinstance(self.checker.model, KeypointModel):
            own = KeypointSource(
                encodings=self.checker.encodings, min_similarity=config.min_similarity, max_ratio=config.max_ratio
            )
            sources.append(own)
        return sources

    def _settle_hanging(
        self, edges: list[EpipolarEdge], checker: PairChecker, model: KeypointModel, progress: Progress
    ) -> list[EpipolarEdge]:
        hanging = hanging_pairs(edges, self.num_images)
        if checker.config.features == "auto" and hanging:
            pairs = [(edges[number].first, edges[number].second) for number in hanging]
            sift = self.detect_sift(np.unique(pairs).tolist())
            checker = replace(checker, sources=[sift, *checker.sources])
            with steps(progress, "match again", len(pairs), "pair"):
                for number, edge in zip(hanging, _check_all(checker, pairs, progress), strict=True):
                    edges[number] = edge
        reading = Lock()

        def rematch(number: int) -> EpipolarEdge:
            pair = edges[number].first, edges[number].second
            with reading:
                views, keypoints = checker.views(pair), checker.keypoints(pair)
            return match_hard_pair(checker, model, pair, views, checker.match(views, keypoints))

        with ThreadPoolExecutor(checker.threads) as pool:
            return settle_hanging_pairs(edges, self.num_images, rematch, pool)

    def calibrate(self, edges: Sequence[EpipolarEdge], rig: Rig) -> list[PairMatches]:
        """Relative pose, points and verdict of every edge, given the cameras."""
        views: dict[int, View] = {}
        for image in {index for edge in edges for index in (edge.first, edge.second)}:
            views[image] = _view(self.checker.encodings[image], rig.cameras[rig.camera_of_image[image]])
        with ThreadPoolExecutor(self.checker.threads) as pool:
            judged = pool.map(
                lambda edge: calibrate_pair(
                    edge, views[edge.first], views[edge.second], self.checker.config, self.checker.seed
                ),
                edges,
            )
            return settle_turns(list(judged), len(rig.camera_of_image))

    def estimate_rig(self, edges: Sequence[EpipolarEdge], records: Sequence[ImageRecord]) -> Rig:
        """One camera per group of photos: focal length from EXIF, else from the edges; centred, without distortion."""
        groups = sorted({record.camera_group for record in records})
        camera_of_image = np.array([groups.index(record.camera_group) for record in records], np.int32)
        sizes = np.array([(record.width_px, record.height_px) for record in records], np.float64)
        scales = np.array([encoding.transform.scale for encoding in self.checker.encodings])
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


def _check_all(checker: PairChecker, pairs: Sequence[Pair], progress: Progress) -> list[EpipolarEdge]:
    """One edge per pair, in their order."""
    found: dict[Pair, EpipolarEdge] = {}
    for some in checker.check(pairs):
        found.update({(edge.first, edge.second): edge for edge in some})
        progress.advance(len(some))
    return [found[pair] for pair in pairs]
