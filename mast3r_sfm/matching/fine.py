"""Matches at the photos' own resolution: coarse to fine (Leroy, Cabon, Revaud, MASt3R, 2024, section 3.4).

A network sees a photo of 12 megapixels at a sixtieth of its pixels. Where the coarse matches of two photos show the
same place, windows of both, as large as what the network sees, are matched in full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.errors import ConfigError
from mast3r_sfm.images.framing import photo_from_window, turned_by
from mast3r_sfm.images.loading import DecodedPhoto
from mast3r_sfm.matching.check import EpipolarEdge, Putative, check_pair
from mast3r_sfm.matching.putative import PointsAt, grid_step, match_dense, nearest_pixels, shown
from mast3r_sfm.matching.straight import PairLenses
from mast3r_sfm.matching.window_encodings import WindowEncodings
from mast3r_sfm.matching.windows import Tiling, select
from mast3r_sfm.models.base import DenseModel, PairModel
from mast3r_sfm.types import Encoding, Float64, ImageRecord, Int64, PixelTransform, Usable

MIN_SCALE = {"auto": 1.5, "fine": 1.01}
"""Photo pixels per network pixel, from which in one of two photos a pair is matched in windows, by `match.resolution`.
Windows of smaller photos show hardly more than the whole photos did, at several times the cost."""
MIN_CONFIRMED = 0.6
"""Share of inliers among fine matches, over that among coarse ones, from which they are believed. Windows bound where
their matches can lie, so that more agree by chance than between whole photos: of noise in windows of 40 px, 0.47."""


def resolve_resolution(config: MatchConfig, model: PairModel, device_type: str) -> MatchConfig:
    """The settings with `resolution` as it is meant for a model and a device.

    auto stays for a dense model on CUDA, where the photos decide; elsewhere it becomes coarse: on a CPU, a window pair
    of the official network takes seconds.

    Raises:
        ConfigError: fine is asked for, of a model without windows.
    """
    if isinstance(model, DenseModel):
        decided = config.resolution != "auto" or device_type == "cuda"
        return config if decided else replace(config, resolution="coarse")
    if config.resolution == "fine":
        raise ConfigError(
            f"match.resolution = 'fine': {model.name} finds keypoints and matches no windows; to have it see more of "
            "large photos, set encode.max_size_px (--set encode.max_size_px=2048), or take --model mast3r"
        )
    return replace(config, resolution="coarse")


@dataclass(frozen=True, kw_only=True)
class _Matches:
    """Pixels of two photos [M, 2], and the confidence of each match [M]."""

    xy_first: Float64
    xy_second: Float64
    confidence: Float64

    def subset(self, index: Int64) -> _Matches:
        """Those with these numbers, in this order."""
        return _Matches(
            xy_first=self.xy_first[index], xy_second=self.xy_second[index], confidence=self.confidence[index]
        )


class FineMatcher:
    """Matches pairs again, window by window; may be shared by threads, of which one at a time is served."""

    def __init__(
        self,
        model: DenseModel,
        records: Sequence[ImageRecord],
        decode: Callable[[int], DecodedPhoto],
        config: MatchConfig,
        seed: int,
        usable: Usable | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            model: encodes and decodes windows as it does photos.
            records: of the photos, by image index.
            decode: gives all pixels of the photo of an image index.
            config: thresholds; `resolution` (auto or fine) says which photos are worth windows.
            seed: of the check.
            usable: where matches may lie; None: everywhere.
        """
        self._model, self._records, self._config, self._seed = model, records, config, seed
        self._min_scale = MIN_SCALE[config.resolution]
        self._encodings = WindowEncodings(model, decode)
        self._usable = usable
        self._lock = Lock()

    def refine(
        self,
        coarse: EpipolarEdge,
        views: tuple[Encoding, Encoding],
        points_at: PointsAt,
        lenses: PairLenses | None = None,
    ) -> EpipolarEdge:
        """Match a pair in windows, and check it again.

        Args:
            coarse: the pair with its coarse matches, checked.
            views: encodings of both photos as wholes.
            points_at: 3D points of pixels of the whole photos, by the coarse prediction. Windows know no common scale,
                so each fine match gets the points of the coarse pixels that are nearest to it.
            lenses: what is known of the cameras; edges are in their straight pixels.

        Returns:
            the pair with fine matches alone; as it was where it is no link, where both photos are too small, and where
            the windows do not confirm it.
        """
        if not coarse.verdict.is_link or max(view.transform.scale for view in views) < self._min_scale:
            return coarse
        lenses = lenses or PairLenses()
        first = _Side.of(coarse.first, self._records[coarse.first], views[0])
        second = _Side.of(coarse.second, self._records[coarse.second], views[1])
        with self._lock:
            matches = self._match_windows(lenses.bend(coarse), first, second)
        if self._usable is not None:
            seen = self._usable(first.image, matches.xy_first) & self._usable(second.image, matches.xy_second)
            matches = matches.subset(np.flatnonzero(seen))
        matches = _thinned(_one_to_one(matches), first, second)
        index_first, index_second = (
            nearest_pixels(xy, view) for xy, view in zip((matches.xy_first, matches.xy_second), views, strict=True)
        )
        putative = Putative(
            xy_first=matches.xy_first / first.scale,
            xy_second=matches.xy_second / second.scale,
            confidence=matches.confidence.astype(np.float32),
            is_distinct=np.ones(len(index_first), np.bool_),
            frames=(shown(views[0]), shown(views[1])),
            points=lambda numbers: points_at(index_first[numbers], index_second[numbers]),
        )
        fine = check_pair((coarse.first, coarse.second), lenses.straighten(putative), self._config, self._seed)
        confirmed = fine.verdict.is_link and fine.inlier_ratio >= MIN_CONFIRMED * coarse.inlier_ratio
        return fine if confirmed else coarse

    def _match_windows(self, coarse: EpipolarEdge, first: _Side, second: _Side) -> _Matches:
        """Matches of all window pairs, in photo pixels; the same pixel may be in several."""
        upright = first.upright_index(coarse.xy_first), second.upright_index(coarse.xy_second)
        # In the order of their places, window pairs one after the other share windows.
        boxes = np.unique(np.concatenate(select(upright, (first.tiling, second.tiling)), axis=1), axis=0)
        found = [_Matches(xy_first=np.zeros((0, 2)), xy_second=np.zeros((0, 2)), confidence=np.zeros(0))]
        at_once = max(self._model.pairs_at_once, self._model.images_at_once)
        for start in range(0, len(boxes), at_once):
            ends = ((first, boxes[start : start + at_once, :4]), (second, boxes[start : start + at_once, 4:]))
            windows = zip(*(self._encode(side, some) for side, some in ends), strict=True)
            seeds = zip(*([side.seeds(box) for box in some] for side, some in ends), strict=True)
            found += self._match_batch(list(windows), list(seeds))
        return _Matches(
            xy_first=np.concatenate([some.xy_first for some in found]),
            xy_second=np.concatenate([some.xy_second for some in found]),
            confidence=np.concatenate([some.confidence for some in found]),
        )

    def _encode(self, side: _Side, boxes: Int64) -> list[Encoding]:
        if side.tiling.is_whole:
            return [side.whole] * len(boxes)
        corners = [(left, top, right, bottom) for left, top, right, bottom in boxes.tolist()]
        return self._encodings.get(side.image, corners, side.tiling.window)

    def _match_batch(
        self, windows: list[tuple[Encoding, Encoding]], seeds: list[tuple[Int64, Int64]]
    ) -> list[_Matches]:
        matches = {}
        for number, forward, backward in self._model.predict(windows):
            first, second = windows[number]
            putative = match_dense((forward, backward), first, second, seeds[number])
            matches[number] = _Matches(
                xy_first=putative.xy_first * first.transform.scale,
                xy_second=putative.xy_second * second.transform.scale,
                confidence=putative.confidence.astype(np.float64),
            )
        # The model answers in any order.
        return [matches[number] for number in range(len(windows))]


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One photo of a pair."""

    image: int
    whole: Encoding
    tiling: Tiling
    stored_from_upright: PixelTransform

    @classmethod
    def of(cls, image: int, record: ImageRecord, whole: Encoding) -> _Side:
        stored = record.width_px, record.height_px
        upright = turned_by(record.orientation, stored)
        return cls(
            image=image,
            whole=whole,
            # All windows of a photo have one shape, that in which the network saw the whole.
            tiling=Tiling(photo=upright, window=whole.network_size, shape=whole.network_size),
            stored_from_upright=photo_from_window(stored, record.orientation, (0, 0, *upright), upright),
        )

    @property
    def scale(self) -> float:
        """Photo pixels per pixel of the check."""
        return self.whole.transform.scale

    def upright_index(self, xy: Float64) -> Float64:
        """Pixels of the check to those of the upright photo, with the centre of the first at (0, 0)."""
        return self.stored_from_upright.to_network(xy * self.scale) - 0.5

    @property
    def step(self) -> int:
        """Pixels of a window from one seed to the next."""
        return grid_step(self.whole.network_size if self.tiling.is_whole else self.tiling.photo)

    def seeds(self, box: Int64) -> Int64:
        """Pixels of a window from which matches are sought.

        They lie on one grid over the whole photo, the same for all of its windows and pairs, so that what several pairs
        match can become one point.
        """
        left, top, right, bottom = (0, 0, *self.whole.network_size) if self.tiling.is_whole else box.tolist()
        columns = np.arange(left + (self.step // 2 - left) % self.step, right, self.step) - left
        rows = np.arange(top + (self.step // 2 - top) % self.step, bottom, self.step) - top
        seeds: Int64 = (rows[:, None] * (right - left) + columns).ravel()
        return seeds

    def cell(self, xy: Float64) -> Int64:
        """[M, 2] which seed of the grid stands for photo pixels."""
        step = self.step * self.scale if self.tiling.is_whole else self.step
        return np.floor((self.stored_from_upright.to_network(xy)) / step).astype(np.int64)


def _one_to_one(matches: _Matches) -> _Matches:
    """No photo pixel twice, in either photo: the more confident match stays, of equal ones the first. Best first."""
    kept = np.argsort(-matches.confidence, kind="stable")
    for xy in (matches.xy_first, matches.xy_second):
        kept = kept[_first_of_each(np.floor(xy[kept]).astype(np.int64))]
    return matches.subset(kept)


def _thinned(matches: _Matches, first: _Side, second: _Side) -> _Matches:
    """Those that are the best one around a seed, in one of the photos at least. Best first.

    Windows overlap, and what several of them find from one seed differs by a pixel: it is one place, found again.
    """
    best = [_first_of_each(side.cell(xy)) for side, xy in ((first, matches.xy_first), (second, matches.xy_second))]
    return matches.subset(np.union1d(*best))


def _first_of_each(rows: Int64) -> Int64:
    """Where each different row [*, 2] stands first, ascending."""
    return np.sort(np.unique(rows, axis=0, return_index=True)[1])
