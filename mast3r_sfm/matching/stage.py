"""The match stage: every edge of the view graph is matched, checked, calibrated and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np

from mast3r_sfm.colmap.lens import Lens
from mast3r_sfm.matching.calibrated import View, calibrate_pair
from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.focal import estimate_focal_ratios
from mast3r_sfm.matching.hard import hanging_pairs, match_hard_pair, settle_hanging_pairs, weaken_hanging_links
from mast3r_sfm.matching.joining import join_parts, may_be_confirmed
from mast3r_sfm.matching.putative import KeypointSource
from mast3r_sfm.matching.rounds import Budget, Rounds, check_all, most_important_first
from mast3r_sfm.matching.second_round import propose_pairs
from mast3r_sfm.matching.turns import settle_turns
from mast3r_sfm.matching.weak_pairs import Part
from mast3r_sfm.models.base import KeypointModel
from mast3r_sfm.progress import Progress, steps
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.types import AlignmentResult, Camera, Encoding, ImageRecord, PairMatches, Rig, ViewGraph

CODE_VERSION = 10


@dataclass(frozen=True, kw_only=True)
class Matcher:
    """Everything the match stage works with."""

    checker: PairChecker
    """How all pairs are matched."""
    num_images: int
    detect_sift: Callable[[Sequence[int]], KeypointSource]
    """Gives the SIFT keypoints of some images."""
    friends: int = 5
    """How many further pairs of each kind an image gets in the second round."""

    def check_graph(
        self, graph: ViewGraph, cache: StageCache, progress: Progress, reserve: ViewGraph | None = None
    ) -> tuple[list[EpipolarEdge], int]:
        """Match and check all pairs; then those that the verified ones make likely; then, harder, those on which the
        connection hangs.

        Args:
            graph: the pairs of the first round.
            cache: where finished work stands.
            progress: told of steps and rounds.
            reserve: what the second round may choose of, besides friends of friends; without pairs, there is none.

        Returns:
            one edge per matched pair, sorted, and the number of chunks found finished.
        """
        config = self.checker.config
        checker = replace(self.checker, sources=self._sources(graph))
        budget = Budget(seconds=60 * config.time_budget_min)
        rounds = Rounds(checker=checker, cache=cache, budget=budget, progress=progress)
        pairs = most_important_first(graph) if config.time_budget_min else [(int(i), int(j)) for i, j in graph.pairs]
        rounds.check("match", pairs)
        if reserve is not None and len(reserve.pairs) and not budget.is_spent:
            more = propose_pairs(rounds.edges, reserve, self.friends)
            progress.note(f"second round: {len(more):,} more pairs, which the verified ones make likely")
            rounds.check("match more", more)
        if rounds.unmatched:
            progress.warn(
                f"the time budget of {config.time_budget_min:g} minutes was spent: {rounds.unmatched:,} of "
                f"{rounds.unmatched + len(rounds.edges):,} pairs were not matched, the least similar ones; the same "
                "command with a larger budget goes on from here"
            )
        edges = sorted(rounds.edges, key=lambda edge: (edge.first, edge.second))
        if edges and isinstance(checker.model, KeypointModel) and config.features != "sift":
            return self._settled(edges, checker.model, rounds, progress), rounds.resumed
        return edges, rounds.resumed

    def _settled(
        self, edges: list[EpipolarEdge], model: KeypointModel, rounds: Rounds, progress: Progress
    ) -> list[EpipolarEdge]:
        if rounds.budget.is_spent:
            return weaken_hanging_links(edges, self.num_images)
        settled = rounds.stored([(edge.first, edge.second) for edge in edges])
        if settled is None:
            settled = self._settle_hanging(edges, rounds.checker, model, progress)
            rounds.store(settled)
        return settled

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
                unhurried = Budget(seconds=0)
                for number, edge in zip(hanging, check_all(checker, pairs, unhurried, progress), strict=True):
                    edges[number] = edge
        reading = Lock()

        def rematch(number: int) -> EpipolarEdge:
            pair = edges[number].first, edges[number].second
            with reading:
                views, keypoints = checker.views(pair), checker.keypoints(pair)
            return match_hard_pair(checker, model, pair, views, lambda: checker.match(views, keypoints))

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

    def join(self, edges: Sequence[EpipolarEdge], parts: Sequence[AlignmentResult], rig: Rig) -> dict[int, PairMatches]:
        """The pairs that confirm each other once parts are aligned, though none was a link by itself, by their numbers.

        Args:
            edges: all checked pairs.
            parts: as the links among them were aligned.
            rig: the cameras with the focal lengths of the parts.
        """
        hopeful = {number: edge for number, edge in enumerate(edges) if may_be_confirmed(edge)}
        placed = {int(image) for part in parts for image in part.images}
        ends = {image for edge in hopeful.values() for image in (edge.first, edge.second)}
        pieces = [*map(Part.of, parts), *map(Part.single, sorted(ends - placed))]
        if not parts or len(pieces) < 2 or not self._has_keypoints:
            return {}
        views = {image: _view(self.checker.encodings[image], rig.cameras[rig.camera_of_image[image]]) for image in ends}
        for part in parts:
            for image, focal in zip(part.images.tolist(), part.focal_px, strict=False):
                if focal > 0 and image in views:
                    views[image] = replace(views[image], focal_px=float(focal) / views[image].scale)
        numbers = list(hopeful)
        found = join_parts(pieces, list(hopeful.values()), views, self.checker.config, self.checker.seed)
        return {numbers[row]: match for row, match in found.items()}

    @property
    def _has_keypoints(self) -> bool:
        return isinstance(self.checker.model, KeypointModel) or self.checker.config.features == "sift"

    def estimate_rig(
        self,
        edges: Sequence[EpipolarEdge],
        records: Sequence[ImageRecord],
        given: Mapping[str, Camera] | None = None,
    ) -> Rig:
        """One camera per group of photos: focal length from EXIF, else from the edges; centred, without distortion.

        Args:
            edges: all checked pairs.
            records: of the photos.
            given: the cameras that are known, by group; they stay as they are.
        """
        given = given or {}
        groups = sorted({record.camera_group for record in records})
        camera_of_image = np.array([groups.index(record.camera_group) for record in records], np.int32)
        sizes = np.array([(record.width_px, record.height_px) for record in records], np.float64)
        scales = np.array([encoding.transform.scale for encoding in self.checker.encodings])
        known = np.full(len(groups), np.nan)
        for camera, record in zip(camera_of_image, records, strict=True):
            if record.exif_focal_px is not None:
                known[camera] = record.exif_focal_px / max(record.width_px, record.height_px)
        centres = sizes / 2
        for camera, group in enumerate(groups):
            if group in given:
                lens = Lens(camera=given[group])
                known[camera] = lens.focal_px / max(given[group].width_px, given[group].height_px)
                centres[camera_of_image == camera] = lens.centre_px
        network = sizes / scales[:, None], known, centres / scales[:, None]
        ratios = estimate_focal_ratios(list(edges), camera_of_image, *network, threads=self.checker.threads)
        cameras = []
        for camera, group in enumerate(groups):
            if group in given:
                cameras.append(given[group])
                continue
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
    if camera.is_given:
        lens = Lens(camera=camera)
        return View(focal_px=lens.focal_px / scale, centre_px=lens.centre_px / scale, scale=scale, lens=lens)
    # Stored photo pixels, scaled: see putative.network_xy.
    return View(focal_px=float(camera.params[0]) / scale, centre_px=camera.params[1:3] / scale, scale=scale)
