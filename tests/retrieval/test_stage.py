"""The pairs stage on made-up places, and on collections that give it little to go by."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pytest

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.errors import ConfigError, InputError, ShapeError
from mast3r_sfm.progress import Progress, SilentProgress
from mast3r_sfm.retrieval import ChosenPairs, choose_pairs, coded, features, similarity
from mast3r_sfm.types import Encoding, Float32, ImageRecord, ImageSet, PixelTransform, Reason, ViewGraph

CHANNELS = 24
SMALL = PairsConfig(keyframes=4, neighbours=3)
PHOTOS = [6, 8, 5, 7]
PLACE = np.repeat(np.arange(4), PHOTOS)


class _Log(SilentProgress):
    """Counts steps and keeps messages."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.done = 0
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def start(self, stage: str, total: int, unit: str) -> None:  # noqa: ARG002
        self.calls.append((stage, total))

    def advance(self, steps: int = 1) -> None:
        self.done += steps

    def finish(self) -> None:
        self.calls.append(("finish", self.done))

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class _Lazy(Sequence[Encoding]):
    """Counts how often each item is asked for."""

    def __init__(self, items: list[Encoding]) -> None:
        self._items = items
        self.asked: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Encoding]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Encoding: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoding]: ...
    def __getitem__(self, index: int | slice) -> Encoding | Sequence[Encoding]:
        assert isinstance(index, int)
        self.asked[index] += 1
        return self._items[index]


def _photos(names: Sequence[str]) -> ImageSet:
    records = [ImageRecord(name=name, width_px=640, height_px=480, sha256=name) for name in sorted(names)]
    return ImageSet(root=Path("photos"), records=tuple(records))


def build_view_graph(
    encodings: Sequence[Encoding], config: PairsConfig, *, model_tokens: int, seed: int, progress: Progress
) -> tuple[ViewGraph, Float32]:
    photos = _photos([f"{index:04}.jpg" for index in range(len(encodings))])
    chosen = choose_pairs(encodings, photos, config, model_tokens=model_tokens, seed=seed, progress=progress)
    return chosen.graph, chosen.similarity


def _encoding(tokens: np.ndarray, attention: np.ndarray | None = None) -> Encoding:
    return Encoding(
        tokens=tokens.astype(np.float16),
        xy=np.zeros((len(tokens), 2), np.float32),
        attention=np.arange(len(tokens), 0, -1, dtype=np.float32) if attention is None else attention,
        transform=PixelTransform(matrix=np.eye(2, 3)),
        network_size=(64, 64),
    )


def _places(photos_of_place: list[int], tokens: int = 200, seed: int = 0) -> list[Encoding]:
    """Photos of places: each sees a random part of its place's tokens, with some noise, and some strangers last."""
    generator = np.random.default_rng(seed)
    photos = []
    for photos_here in photos_of_place:
        place = generator.standard_normal((5 * tokens // 4, CHANNELS))
        for _ in range(photos_here):
            seen = place[generator.choice(len(place), tokens, replace=False)]
            seen = seen + 0.1 * generator.standard_normal(seen.shape)
            seen[-tokens // 4 :] = generator.standard_normal((tokens // 4, CHANNELS))
            photos.append(_encoding(seen / np.linalg.norm(seen, axis=1, keepdims=True)))
    return photos


def test_photos_of_one_place_find_each_other() -> None:
    log = _Log()
    photos = _Lazy(_places(PHOTOS))
    graph, similarity = build_view_graph(photos, SMALL, model_tokens=150, seed=0, progress=log)
    assert similarity.shape == (26, 26)
    assert similarity.dtype == np.float32
    np.testing.assert_array_equal(similarity, similarity.T)
    np.testing.assert_array_equal(similarity.diagonal(), 1)
    assert 0 <= similarity.min() <= similarity.max() <= 1
    same = PLACE[:, None] == PLACE
    others = ~np.eye(26, dtype=bool)
    assert similarity[same & others].min() > 2 * similarity[~same].max()

    near = graph.reason == Reason.NEIGHBOUR
    assert (PLACE[graph.pairs[near, 0]] == PLACE[graph.pairs[near, 1]]).all()
    assert sorted(set(PLACE[graph.pairs[graph.reason == Reason.KEYFRAME]].ravel())) == [0, 1, 2, 3]
    assert len(graph.pairs) < 26 * 25 // 2
    assert log.calls == [("pairs", 52), ("finish", 52)]
    assert photos.asked == dict.fromkeys(range(26), 2)
    assert not log.warnings
    assert "pairs are matched" in log.notes[-1]


def test_the_same_input_gives_the_same_result() -> None:
    first, again, other = (
        build_view_graph(_places(PHOTOS), SMALL, model_tokens=150, seed=seed, progress=SilentProgress())
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first[1], again[1])
    np.testing.assert_array_equal(first[0].pairs, again[0].pairs)
    assert (other[1] != first[1]).any()


@pytest.mark.parametrize("largest", [26, 25])
def test_neither_blocks_nor_a_missing_matrix_change_the_pairs(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    encodings, photos = _places(PHOTOS), _photos([f"{index:02}.jpg" for index in range(26)])
    settings: dict[str, Any] = {"config": SMALL, "model_tokens": 150, "seed": 0, "progress": SilentProgress()}
    whole = choose_pairs(encodings, photos, **settings)
    monkeypatch.setattr(similarity, "LARGEST_MATRIX", largest)
    monkeypatch.setattr(similarity, "NEAREST_KEPT", 4)
    monkeypatch.setattr(similarity, "SHOWN", 6)
    monkeypatch.setattr(coded, "_CELLS_AT_ONCE", 3 * 26)
    parts = choose_pairs(encodings, photos, **settings, threads=2)
    for name in ("pairs", "score", "reason"):
        np.testing.assert_array_equal(getattr(parts.graph, name), getattr(whole.graph, name))
        np.testing.assert_array_equal(getattr(parts.reserve, name), getattr(whole.reserve, name))
    shown = np.arange(26) if largest == 26 else np.arange(0, 26, 5)
    np.testing.assert_array_equal(parts.similarity, whole.similarity[np.ix_(shown, shown)])


def test_the_number_of_threads_does_not_matter() -> None:
    script = """
import hashlib, sys, numpy as np
from mast3r_sfm.config import PairsConfig
from pathlib import Path
from mast3r_sfm.progress import SilentProgress
from mast3r_sfm.retrieval import choose_pairs
from mast3r_sfm.types import Encoding, ImageRecord, ImageSet, PixelTransform

generator = np.random.default_rng(0)
photos = [
    Encoding(
        tokens=generator.standard_normal((1000, 64)).astype(np.float16),
        xy=np.zeros((1000, 2), np.float32),
        attention=np.ones(1000, np.float32),
        transform=PixelTransform(matrix=np.eye(2, 3)),
        network_size=(64, 64),
    )
    for _ in range(20)
]
records = tuple(ImageRecord(name=f"{i:02}", width_px=64, height_px=64, sha256="") for i in range(20))
images = ImageSet(root=Path(), records=records)
chosen = choose_pairs(
    photos, images, PairsConfig(), model_tokens=1000, seed=0, progress=SilentProgress(), threads=int(sys.argv[1])
)
similarity = chosen.similarity
print(hashlib.sha256(similarity.tobytes()).hexdigest())
"""
    results = {
        subprocess.run(
            [sys.executable, "-c", script, threads],
            env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(results) == 1


def test_many_runs_of_images_give_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = _places(PHOTOS)
    config = PairsConfig(keyframes=4, neighbours=3, codebook_words=256)
    whole = build_view_graph(photos, config, model_tokens=150, seed=0, progress=SilentProgress())[1]
    monkeypatch.setattr(features, "_VALUES_AT_ONCE", 1)
    single = build_view_graph(photos, config, model_tokens=150, seed=0, progress=SilentProgress())[1]
    # Another sample trains the words; what is alike stays alike.
    same = PLACE[:, None] == PLACE
    assert single[same].min() > 2 * single[~same].max()
    assert np.corrcoef(whole.ravel(), single.ravel())[0, 1] > 0.95


def test_only_the_strongest_tokens_count() -> None:
    photos = _places(PHOTOS, tokens=100)
    noise = np.random.default_rng(1).standard_normal((26, 50, photos[0].tokens.shape[1]))
    attention = np.concatenate([np.zeros(50), np.linspace(2, 1, 100)]).astype(np.float32)
    disturbed = [
        _encoding(np.concatenate([extra, photo.tokens]), attention) for extra, photo in zip(noise, photos, strict=True)
    ]
    config = PairsConfig(keyframes=4, neighbours=3, tokens_per_image=100)
    clean, same = (
        build_view_graph(encodings, config, model_tokens=999, seed=0, progress=SilentProgress())[1]
        for encodings in (photos, disturbed)
    )
    np.testing.assert_array_equal(clean, same)


def test_small_collections_are_matched_exhaustively_with_true_scores() -> None:
    log = _Log()
    graph, similarity = build_view_graph(_places([3, 2]), PairsConfig(), model_tokens=150, seed=0, progress=log)
    assert len(graph.pairs) == 10
    assert set(graph.reason.tolist()) == {Reason.EXHAUSTIVE}
    np.testing.assert_allclose(graph.score, similarity[tuple(graph.pairs.T)])
    same = (graph.pairs[:, 0] < 3) == (graph.pairs[:, 1] < 3)
    assert graph.score[same].min() > 1.2 * graph.score[~same].max()
    assert log.notes[-1] == "all 10 pairs of 5 photos are matched"


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_photos_that_show_nothing_still_get_a_connected_graph(tokens: int) -> None:
    log = _Log()
    photos = [_encoding(np.ones((tokens, 8))) for _ in range(12)]
    graph, similarity = build_view_graph(
        photos, PairsConfig(keyframes=2, neighbours=1), model_tokens=5, seed=0, progress=log
    )
    np.testing.assert_array_equal(similarity, np.eye(12))
    assert len(graph.pairs) == 11
    assert len(log.warnings) == 1
    assert log.calls == [("pairs", 24), ("finish", 24)]


def test_one_photo_without_tokens_is_similar_to_nothing() -> None:
    photos = _places([4, 4])
    photos[2] = _encoding(np.zeros((0, photos[0].tokens.shape[1])))
    config = PairsConfig(keyframes=2, neighbours=1)
    graph, similarity = build_view_graph(photos, config, model_tokens=150, seed=0, progress=SilentProgress())
    assert similarity[2].sum() == 1
    assert 2 in graph.pairs
    assert np.delete(np.delete(similarity, 2, 0), 2, 1).min() >= 0


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tiny_collections(count: int) -> None:
    graph, similarity = build_view_graph(
        _places([count]), PairsConfig(), model_tokens=100, seed=0, progress=SilentProgress()
    )
    assert similarity.shape == (count, count)
    assert graph.num_images == count
    assert len(graph.pairs) == count * (count - 1) // 2


def test_more_words_than_tokens_is_no_error() -> None:
    config = PairsConfig(codebook_words=100_000)
    similarity = build_view_graph(_places([3, 3]), config, model_tokens=50, seed=0, progress=SilentProgress())[1]
    assert np.isfinite(similarity).all()


def test_mixed_models_are_refused() -> None:
    photos = [*_places([2]), _encoding(np.ones((4, 9)))]
    with pytest.raises(ShapeError, match="image 2 has tokens of 9 channels"):
        build_view_graph(photos, PairsConfig(), model_tokens=100, seed=0, progress=SilentProgress())


def _choose(names: Sequence[str], log: _Log, seed: int = 0, **settings: Any) -> ChosenPairs:
    """Of photos of which every four neighbours in the order of their names show one place."""
    encodings = _places([4] * (len(names) // 4))
    config = PairsConfig(**{"keyframes": 1, "neighbours": 1, **settings})
    return choose_pairs(encodings, _photos(names), config, model_tokens=150, seed=seed, progress=log)


FRAMES = [f"{'ab'[index // 8]}/{index:02}.jpg" for index in range(16)]


def _kinds(graph: ViewGraph) -> dict[Reason, int]:
    return {reason: int((graph.reason == reason).sum()) for reason in Reason if (graph.reason == reason).any()}


def test_sequences_of_several_folders_are_joined_by_one_bridge() -> None:
    log = _Log()
    chosen = _choose(FRAMES, log, source="sequential", window=1)
    assert _kinds(chosen.graph) == {Reason.SEQUENCE: 2 * (7 + 6), Reason.BRIDGE: 1}
    ((first, second),) = chosen.graph.pairs[chosen.graph.reason == Reason.BRIDGE]
    assert first < 8 <= second
    between = chosen.similarity[:8, 8:]
    assert chosen.similarity[first, second] == between.max()
    assert "26 by the order of the names" in log.notes[-1]
    assert "1 as bridges between parts" in log.notes[-1]


def test_a_list_alone_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("a/00.jpg b/15.jpg\nb/15.jpg a/03.jpg\nb/15.jpg a/00.jpg\n")
    chosen = _choose(FRAMES, _Log(), source="file", file=str(path))
    assert chosen.graph.pairs.tolist() == [[0, 15], [3, 15]]
    assert set(chosen.graph.reason.tolist()) == {Reason.USER}
    np.testing.assert_allclose(chosen.graph.score, chosen.similarity[[0, 3], 15])
    assert len(chosen.reserve.pairs) == 0


def test_sources_are_joined_and_a_pair_keeps_its_first_reason(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("a/00.jpg a/01.jpg\na/00.jpg b/15.jpg\n")
    alone = _choose(FRAMES, _Log(), source="retrieval")
    both = _choose(FRAMES, _Log(), source="file, retrieval,swin", file=str(path), window=1)
    kinds = _kinds(both.graph)
    found = {tuple(pair) for pair in both.graph.pairs.tolist()}
    expected = {tuple(pair) for pair in alone.graph.pairs[alone.graph.reason != Reason.BRIDGE].tolist()}
    expected |= {(0, 1), (0, 15)} | {(i, i + 1) for i in range(15) if i != 7} | {(0, 7), (8, 15)}
    assert found == expected
    assert kinds[Reason.NEIGHBOUR] == _kinds(alone.graph)[Reason.NEIGHBOUR]
    assert kinds[Reason.USER] >= 1
    assert Reason.BRIDGE not in kinds


def test_the_reserve_holds_the_next_most_similar_pairs() -> None:
    chosen = _choose(FRAMES, _Log(), source="retrieval")
    matched = {tuple(pair) for pair in chosen.graph.pairs.tolist()}
    kept = {tuple(pair) for pair in chosen.reserve.pairs.tolist()}
    assert not matched & kept
    for image in range(16):
        others = [j for j in np.argsort(-chosen.similarity[image], kind="stable") if j != image]
        free = [j for j in others if (min(image, j), max(image, j)) not in matched]
        assert {(min(image, j), max(image, j)) for j in free[:2]} <= kept
    np.testing.assert_allclose(chosen.reserve.score, chosen.similarity[tuple(chosen.reserve.pairs.T)])
    assert len(_choose(FRAMES, _Log(), source="retrieval", second_round=False).reserve.pairs) == 0
    assert len(_choose(FRAMES, _Log(), source="exhaustive").reserve.pairs) == 0


def test_sources_that_cannot_be_used_are_found_out_before_any_work() -> None:
    encodings = _Lazy(_places([4]))
    with pytest.raises(InputError, match="GPS position"):
        choose_pairs(
            encodings,
            _photos(FRAMES[:4]),
            PairsConfig(source="gps"),
            model_tokens=10,
            seed=0,
            progress=SilentProgress(),
        )
    assert not encodings.asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "nearby"}, "must be auto, or of retrieval, exhaustive"),
        ({"source": "auto,gps"}, "must be auto, or of"),
        ({"source": ""}, "must be auto, or of"),
        ({"source": "file"}, "needs pairs.file"),
        ({"source": "gps", "file": "x.txt"}, "read only if pairs.source names file"),
        ({"window": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PairsConfig(**settings)


def test_keyframes_fit_the_collection() -> None:
    assert [PairsConfig().keyframes_of(count) for count in (3, 40, 41, 60, 100, 5000)] == [8, 8, 8, 12, 20, 20]
    assert PairsConfig(keyframes=5).keyframes_of(5000) == 5


def test_large_collections_get_fewer_tokens_per_image() -> None:
    counts = [features.suitable_tokens(2000, images) for images in (0, 1, 500, 1000, 3333, 100_000)]
    assert counts == [2000, 2000, 2000, 1000, 300, 300]
    assert features.suitable_tokens(100, 100_000) == 100
