"""Matching in windows: finer than a network pixel, once per window, in every orientation, whatever the batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mast3r_sfm.config import EncodeConfig, MatchConfig
from mast3r_sfm.errors import ConfigError
from mast3r_sfm.images.framing import photo_from_window, turned_by
from mast3r_sfm.images.loading import DecodedPhoto, decode_photo, load_image
from mast3r_sfm.matching.check import EpipolarEdge, MatchedPoints, check_pair
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.fine import FineMatcher, _Matches, _one_to_one, resolve_resolution
from mast3r_sfm.matching.putative import match_dense, pair_points
from mast3r_sfm.matching.stage import Matcher
from mast3r_sfm.matching.window_encodings import WindowEncodings
from mast3r_sfm.models.base import DenseModel, KeypointModel
from mast3r_sfm.models.registry import load_model
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.synthetic.oracle import OracleModel
from mast3r_sfm.synthetic.render import View, make_views
from mast3r_sfm.synthetic.scenes import make_scene
from mast3r_sfm.types import (
    Bool,
    Encoding,
    Float64,
    ImageRecord,
    Int64,
    LoadedImage,
    PairPrediction,
    PixelTransform,
    Preparation,
    Verdict,
    ViewPrediction,
)
from tests.exact import Listener, all_pairs, no_sift
from tests.scenes import photo_folder

FINE = MatchConfig(resolution="fine")


class PixelModel:
    """Knows each pixel again by its colour, which also says where it lies in space; notes what it is asked."""

    name = "pixels"
    fingerprint = "0" * 64
    retrieval_tokens = 1
    token_channels = 1
    images_at_once = 3
    preparation = Preparation(size_px=40)

    def __init__(self, pairs_at_once: int = 2) -> None:
        self.pairs_at_once = pairs_at_once
        self.encoded: list[tuple[str, bytes]] = []
        self._waves = np.random.default_rng(5).normal(size=(3, 16)) / 8

    def encode(self, images: Sequence[LoadedImage]) -> list[Encoding]:
        assert len(images) <= self.images_at_once
        self.encoded += [(image.record.name, image.transform.matrix.tobytes()) for image in images]
        return [
            Encoding(
                tokens=image.pixels.reshape(-1, 3).astype(np.float16),
                xy=np.zeros((image.pixels.size // 3, 2), np.float32),
                attention=np.ones(image.pixels.size // 3, np.float32),
                transform=image.transform,
                network_size=(image.pixels.shape[1], image.pixels.shape[0]),
            )
            for image in images
        ]

    def predict(
        self, pairs: Sequence[tuple[Encoding, Encoding]]
    ) -> Iterator[tuple[int, PairPrediction, PairPrediction]]:
        """Last pair first."""
        for number in reversed(range(len(pairs))):
            first, second = (self._view(encoding) for encoding in pairs[number])
            yield number, PairPrediction(first=first, second=second), PairPrediction(first=second, second=first)

    def _view(self, encoding: Encoding) -> ViewPrediction:
        colours = torch.from_numpy(encoding.tokens.astype(np.float32))
        phase = encoding.tokens.astype(np.float64) @ self._waves
        values = np.concatenate([np.cos(phase), np.sin(phase)], axis=1).astype(np.float32) / 4
        shape = encoding.network_size[::-1]
        return ViewPrediction(
            descriptors=torch.from_numpy(values).reshape(*shape, -1),
            descriptor_confidence=torch.ones(shape),
            points_at=lambda index: (colours[index], torch.ones(len(index))),
        )


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """Photos of coloured noise; an upright pixel of one lies at itself minus SHIFT in the next.

    The shift is a whole number of network pixels, so that the photos look alike to the network, too.
    """

    root: Path
    records: tuple[ImageRecord, ...]

    SHIFT: ClassVar = (12, 9)

    def decode(self, image: int) -> DecodedPhoto:
        return decode_photo(self.root, self.records[image])

    def views(self, model: PixelModel) -> tuple[Encoding, Encoding]:
        first, second, *_ = self.encodings(model)
        return first, second

    def encodings(self, model: PixelModel) -> list[Encoding]:
        return model.encode([load_image(self.root, record, model.preparation) for record in self.records])

    def upright(self, image: int) -> PixelTransform:
        """Stored from upright pixels."""
        record = self.records[image]
        stored = (record.width_px, record.height_px)
        size = turned_by(record.orientation, stored)
        return photo_from_window(stored, record.orientation, (0, 0, *size), size)

    def coarse(self, views: tuple[Encoding, Encoding], verdict: Verdict = Verdict.GOOD) -> EpipolarEdge:
        """What a coarse match would give: places good to a few pixels."""
        rng = np.random.default_rng(0)
        first = rng.uniform(self.SHIFT, (120, 90), (400, 2))
        second = first - self.SHIFT + rng.uniform(-2, 2, (400, 2))
        xy = [
            self.upright(image).to_photo(places) / views[image].transform.scale
            for image, places in enumerate((first, second))
        ]
        return EpipolarEdge(
            first=0,
            second=1,
            xy_first=xy[0],
            xy_second=xy[1],
            confidence=np.ones(400, np.float32),
            is_distinct=np.ones(400, np.bool_),
            points_first=None,
            points_second=None,
            fundamental=np.eye(3),
            homography=np.eye(3),
            homography_share=1.0,
            num_putative=400,
            rejected=np.zeros((0, 5), np.float32),
            verdict=verdict,
        )


def shifted(folder: Path, orientations: tuple[int, ...] = (1, 1)) -> Shifted:
    noise = np.random.default_rng(1).integers(0, 256, (140, 180, 3), dtype=np.uint8)
    records = []
    for number, orientation in enumerate(orientations):
        left, top = (number * step for step in Shifted.SHIFT)
        image = Image.fromarray(noise[top : top + 90, left : left + 120])
        undo = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
        turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's numbers of the transpositions
        stored = image if undo == 1 else image.transpose(Image.Transpose(turn[undo]))
        tags = Image.Exif()
        tags[ExifTags.Base.Orientation] = orientation
        name = f"{number}.png"
        stored.save(folder / name, exif=tags)
        records.append(
            ImageRecord(name=name, width_px=stored.width, height_px=stored.height, sha256="", orientation=orientation)
        )
    return Shifted(root=folder, records=tuple(records))


def some_points(first: Int64, second: Int64) -> MatchedPoints:
    points = (np.repeat(index[:, None], 3, 1).astype(np.float64) for index in (first, second))
    return MatchedPoints(first=next(points), second=next(points), decode_disagreement_deg=0.0)


@pytest.mark.parametrize("orientations", [(1, 1), (1, 6), (8, 3), (2, 7), (5, 4), (3, 8)])
def test_matches_lie_on_photo_pixels_in_every_orientation(tmp_path: Path, orientations: tuple[int, int]) -> None:
    photos, model = shifted(tmp_path, orientations), PixelModel()
    assert isinstance(model, DenseModel)
    views = photos.views(model)
    matcher = FineMatcher(model, photos.records, photos.decode, FINE, 0)
    edge = matcher.refine(photos.coarse(views), views, some_points)
    # At the borders of windows, what has no partner finds a wrong one.
    assert 3500 < len(edge.xy_first) <= edge.num_putative < 4500
    places = []
    for image, xy in enumerate((edge.xy_first, edge.xy_second)):
        place = photos.upright(image).to_network(xy * views[image].transform.scale)
        np.testing.assert_allclose(place % 1, 0.5, atol=1e-6)
        assert len(np.unique(np.floor(place), axis=0)) == len(place)
        places.append(place)
    exact = np.abs(places[0] - places[1] - photos.SHIFT).max(axis=1) < 1e-6
    assert exact.mean() > 0.97
    # What both photos show is covered.
    assert np.ptp(places[0], axis=0).min() > 75
    for image, points in enumerate((edge.points_first, edge.points_second)):
        assert points is not None
        width = views[image].network_size[0]
        column, row = np.floor(places[image] / 3).astype(int).T
        np.testing.assert_array_equal(points[:, 0], row * width + column)


def test_nothing_depends_on_batches(tmp_path: Path) -> None:
    photos = shifted(tmp_path)
    edges = []
    for pairs_at_once in (1, 2, 50):
        model = PixelModel(pairs_at_once)
        views = photos.views(model)
        edges.append(
            FineMatcher(model, photos.records, photos.decode, FINE, 0).refine(photos.coarse(views), views, some_points)
        )
        # Each window is encoded once, and so were the two photos.
        assert len(set(model.encoded)) == len(model.encoded) > 10
    for edge in edges[1:]:
        np.testing.assert_array_equal(edge.xy_first, edges[0].xy_first)
        np.testing.assert_array_equal(edge.xy_second, edges[0].xy_second)


def refuse(*_: object) -> DecodedPhoto:
    raise AssertionError("the photo is not needed")


@pytest.mark.parametrize("verdict", [Verdict.WEAK, Verdict.TOO_FEW])
def test_only_links_are_matched_again(tmp_path: Path, verdict: Verdict) -> None:
    photos, model = shifted(tmp_path), PixelModel()
    views = photos.views(model)
    coarse = photos.coarse(views, verdict)
    assert FineMatcher(model, photos.records, refuse, FINE, 0).refine(coarse, views, some_points) is coarse


@pytest.mark.parametrize(
    ("resolution", "size_px", "again"),
    [("fine", 40, True), ("fine", 110, True), ("fine", 120, False), ("auto", 80, True), ("auto", 81, False)],
)
def test_only_large_photos_are_matched_again(tmp_path: Path, resolution: Any, size_px: int, again: bool) -> None:
    photos, model = shifted(tmp_path), PixelModel()
    model.preparation = Preparation(size_px=size_px)
    views = photos.views(model)
    config = replace(FINE, resolution=resolution)
    coarse = photos.coarse(views)
    decode = photos.decode if again else refuse
    edge = FineMatcher(model, photos.records, decode, config, 0).refine(coarse, views, some_points)
    assert (edge is coarse) != again


def test_what_windows_do_not_confirm_stays_as_it_was(tmp_path: Path) -> None:
    photos, model = shifted(tmp_path), PixelModel()
    views = photos.views(model)
    noise = np.random.default_rng(2).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "1.png")
    coarse = photos.coarse(views)
    assert FineMatcher(model, photos.records, photos.decode, FINE, 0).refine(coarse, views, some_points) is coarse


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_network_with_patches_is_given_windows_it_can_take(
    golden_dir: Path, tmp_path: Path, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = shifted(tmp_path, (1, orientation))
    model = load_model(str(golden_dir / "tiny_mast3r.safetensors"), device="cpu", config=EncodeConfig(max_size_px=64))
    assert isinstance(model, DenseModel)
    views = model.encode([load_image(tmp_path, record, model.preparation) for record in photos.records])
    assert [view.network_size for view in views] == [(64, 48)] * 2
    seen: list[tuple[int, int]] = []
    encode = model.encode

    def note(images: Sequence[LoadedImage]) -> list[Encoding]:
        seen.extend((image.pixels.shape[1], image.pixels.shape[0]) for image in images)
        assert all(image.transform.scale == pytest.approx(1) for image in images)
        return encode(images)

    monkeypatch.setattr(model, "encode", note)
    coarse = photos.coarse((views[0], views[1]))
    edge = FineMatcher(model, photos.records, photos.decode, FINE, 0).refine(coarse, (views[0], views[1]), some_points)
    # Random weights find nothing.
    assert edge is coarse
    assert set(seen) == {(64, 48)}
    assert len(seen) > 10


class TestWindowEncodings:
    """What is kept, and for how long."""

    BOXES: ClassVar = [(0, 0, 40, 30), (20, 15, 60, 45), (80, 60, 120, 90), (1, 2, 41, 32)]

    def test_windows_are_encoded_once(self, tmp_path: Path) -> None:
        photos, model = shifted(tmp_path), PixelModel()
        decoded: list[int] = []

        def decode(image: int) -> DecodedPhoto:
            decoded.append(image)
            return photos.decode(image)

        windows = WindowEncodings(model, decode)
        found = windows.get(0, [*self.BOXES, self.BOXES[1]], (40, 30))
        assert found[1] is found[4]
        assert len(model.encoded) == 4
        again = windows.get(0, self.BOXES[::-1], (40, 30))
        assert [one is other for one, other in zip(again, found[3::-1], strict=True)] == [True] * 4
        windows.get(1, self.BOXES, (40, 30))
        assert len(model.encoded) == 8
        windows.get(0, self.BOXES[:1], (20, 15))  # another size is another window
        assert len(model.encoded) == 9
        assert decoded == [0, 1]
        colours = found[1].tokens.reshape(30, 40, 3)
        with Image.open(tmp_path / "0.png") as image:
            np.testing.assert_array_equal(colours, np.asarray(image)[15:45, 20:60])

    def test_memory_is_bounded(self, tmp_path: Path) -> None:
        photos, model = shifted(tmp_path), PixelModel()
        one = 40 * 30 * (3 * 2 + 2 * 4 + 4)
        windows = WindowEncodings(model, photos.decode, cache_bytes=2 * one, photos=1)
        found = windows.get(0, self.BOXES, (40, 30))
        assert len(found) == 4  # more than is kept
        windows.get(0, self.BOXES[2:], (40, 30))
        assert len(model.encoded) == 4
        windows.get(0, self.BOXES[:1], (40, 30))
        assert len(model.encoded) == 5
        assert windows._bytes == 2 * one
        windows.get(1, self.BOXES[:1], (40, 30))
        assert list(windows._photos) == [1]


class Keypoints(PixelModel):
    """No dense model: it cannot predict."""

    name = "keypoints"
    predict = None  # type: ignore[assignment]

    def match_hard(self, first: Encoding, second: Encoding) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        raise NotImplementedError((first, second))


def test_what_resolution_means_follows_from_model_and_device() -> None:
    dense, keypoints = PixelModel(), Keypoints()
    assert isinstance(keypoints, KeypointModel)
    for device in ("cpu", "cuda", "mps"):
        for config in (FINE, replace(FINE, resolution="coarse")):
            assert resolve_resolution(config, dense, device) == config
    auto = MatchConfig()
    assert auto.resolution == "auto"
    assert resolve_resolution(auto, dense, "cuda").resolution == "auto"
    assert resolve_resolution(auto, dense, "cpu").resolution == "coarse"
    assert resolve_resolution(auto, keypoints, "cuda").resolution == "coarse"
    with pytest.raises(ConfigError, match=r"keypoints finds keypoints .* set encode\.max_size_px"):
        resolve_resolution(FINE, keypoints, "cuda")


WIDTH_PX, HEIGHT_PX, TIMES = 64, 48, 3


@dataclass(frozen=True, kw_only=True)
class House:
    """A façade in photos three times as large as what the oracle sees."""

    root: Path
    photos: list[View]
    records: list[ImageRecord]
    model: OracleModel
    encodings: list[Encoding]

    def decode(self, image: int) -> DecodedPhoto:
        return decode_photo(self.root, self.records[image])

    def errors(self, edge: EpipolarEdge) -> Float64:
        """[M] how far each match is from the truth, in pixels of the second photo."""
        first, second = self.photos[edge.first].camera, self.photos[edge.second].camera
        directions = first.rays(edge.xy_first * TIMES) @ first.cam_from_world[:, :3]
        depth, _ = make_scene("facade").nearest(first.centre, directions)
        true, _ = second.project(first.centre + depth[:, None] * directions)
        return np.linalg.norm(true - edge.xy_second * TIMES, axis=1)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    seen = make_views("facade", 3, width_px=WIDTH_PX, height_px=HEIGHT_PX)
    photos = make_views("facade", 3, width_px=TIMES * WIDTH_PX, height_px=TIMES * HEIGHT_PX, samples=1)
    root = photo_folder(tmp_path_factory.mktemp("house"), photos)
    records = [
        ImageRecord(name=name, width_px=TIMES * WIDTH_PX, height_px=TIMES * HEIGHT_PX, sha256="") for name in photos
    ]
    model = OracleModel(seen, scene=make_scene("facade"))
    encodings = model.encode([load_image(root, record, model.preparation) for record in records])
    return House(root=root, photos=list(photos.values()), records=records, model=model, encodings=encodings)


def test_fine_matches_are_as_exact_as_the_photos_are_large(house: House) -> None:
    views = house.encodings[0], house.encodings[2]
    ((_, *orders),) = house.model.predict([views])
    coarse = check_pair((0, 2), match_dense((orders[0], orders[1]), *views), FINE, 0)
    matcher = FineMatcher(house.model, house.records, house.decode, FINE, 0)
    fine = matcher.refine(coarse, views, pair_points((orders[0], orders[1])))
    errors = house.errors(coarse), house.errors(fine)
    # A coarse match ends at the middle of a network pixel, a fine one at that of a photo pixel.
    assert 0.7 < np.median(errors[0]) < 1.6
    assert 0.2 < np.median(errors[1]) < 0.5
    assert 2.4 < np.median(errors[0]) / np.median(errors[1]) < 3.6
    assert (errors[1] < 1.5).mean() > 0.99
    assert fine.inlier_ratio > 0.98
    assert len(coarse.xy_first) < len(fine.xy_first) < 2 * 4096
    # They lie everywhere where the coarse ones do.
    cells = [{tuple(cell) for cell in np.floor(edge.xy_first / 4).astype(int).tolist()} for edge in (coarse, fine)]
    assert len(cells[0] & cells[1]) > 0.95 * len(cells[0])
    # Their points are those of the coarse prediction, in its scale.
    assert fine.points_first is not None
    assert fine.points_second is not None
    for image, points, xy in ((0, fine.points_first, fine.xy_first), (2, fine.points_second, fine.xy_second)):
        camera = house.photos[image].camera
        seen = points @ camera.intrinsics.T
        distance = np.linalg.norm(seen[:, :2] / seen[:, 2:] - TIMES * xy, axis=1)
        assert distance.max() < TIMES  # of the nearest coarse pixel


def test_a_stage_that_was_cut_off_ends_as_if_it_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = shifted(tmp_path, (1, 6, 1))
    monkeypatch.setattr("mast3r_sfm.matching.rounds.PAIRS_PER_CHUNK", 1)

    def run(folder: str, model: PixelModel, threads: int) -> tuple[list[EpipolarEdge], int]:
        encodings = photos.encodings(model)
        fine = FineMatcher(model, photos.records, photos.decode, FINE, 0)
        checker = PairChecker(model=model, encodings=encodings, config=FINE, seed=0, threads=threads, fine=fine)
        matcher = Matcher(checker=checker, num_images=3, detect_sift=no_sift)
        return matcher.check_graph(all_pairs(3), StageCache(tmp_path, folder, "key", Listener()), Listener())

    whole, resumed = run("whole", PixelModel(), 2)
    assert resumed == 0
    cut = PixelModel()
    predict, calls = cut.predict, iter(range(1000))

    def fail(pairs: Sequence[tuple[Encoding, Encoding]]) -> Iterator[tuple[int, PairPrediction, PairPrediction]]:
        if next(calls) == 20:
            raise KeyboardInterrupt
        return predict(pairs)

    monkeypatch.setattr(cut, "predict", fail)
    with pytest.raises(KeyboardInterrupt):
        run("cut", cut, 1)
    again, resumed = run("cut", PixelModel(), 1)
    assert 0 < resumed < 3
    for one, other in zip(whole, again, strict=True):
        assert len(one.xy_first) > 1000
        # At full resolution: photo pixels, not network ones.
        np.testing.assert_allclose(3 * one.xy_first % 1, 0.5, atol=1e-6)
        for name in ("xy_first", "xy_second", "confidence", "points_first", "points_second", "fundamental"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_no_pixel_is_matched_twice_and_the_more_confident_match_wins() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 12, (2, 500, 2)) + 0.5
    matches = _Matches(xy_first=first, xy_second=second, confidence=rng.permutation(500) / 500)
    kept = _one_to_one(matches)
    assert 40 < len(kept.confidence) < 144
    assert (np.diff(kept.confidence) < 0).all()
    for own, all_of_them in ((kept.xy_first, first), (kept.xy_second, second)):
        assert len(np.unique(own, axis=0)) == len(own)
        assert {tuple(xy) for xy in own.tolist()} <= {tuple(xy) for xy in all_of_them.tolist()}
    best = int(matches.confidence.argmax())
    np.testing.assert_array_equal(kept.xy_first[0], first[best])
    np.testing.assert_array_equal(kept.xy_second[0], second[best])
    for xy, other, sure in zip(kept.xy_first, kept.xy_second, kept.confidence, strict=True):
        # Of equal pairs of pixels, the most confident.
        rivals = (first == xy).all(axis=1) & (second == other).all(axis=1)
        assert sure == matches.confidence[rivals].max()


def test_windows_give_no_match_in_a_masked_pixel(house: House) -> None:
    views = house.encodings[0], house.encodings[2]
    ((_, *orders),) = house.model.predict([views])
    coarse = check_pair((0, 2), match_dense((orders[0], orders[1]), *views), FINE, 0)

    def usable(image: int, xy: Float64) -> Bool:
        return np.floor(xy[:, image // 2]) % 3 != 0

    edges = [
        FineMatcher(house.model, house.records, house.decode, FINE, 0, which).refine(
            coarse, views, pair_points((orders[0], orders[1]))
        )
        for which in (None, usable)
    ]
    scale = views[0].transform.scale
    seen = [usable(0, edge.xy_first * scale) & usable(2, edge.xy_second * scale) for edge in edges]
    assert 0.3 < seen[0].mean() < 0.6
    assert seen[1].all()
    assert len(seen[1]) > 0.4 * len(seen[0])
