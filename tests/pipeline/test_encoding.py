"""The encode stage by itself: chunks that are found again, batches, order, threads and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
import torch
from PIL import Image

from mast3r_sfm import encoding as module
from mast3r_sfm.encoding import Encoder, torch_threads
from mast3r_sfm.errors import InputError
from mast3r_sfm.storage import encodings as storage
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.types import Encoding, ImageRecord, LoadedImage, Preparation
from tests.exact import Listener

PHOTOS = 7
CHUNKS = 3


class Colours:
    """Describes a photo by its colour, and notes what it is asked, and with how many threads torch works then."""

    name = "colours"
    fingerprint = "0" * 64
    preparation = Preparation(size_px=8)

    def __init__(self, images_at_once: int = 1) -> None:
        self.images_at_once = images_at_once
        self.batches: list[list[str]] = []
        self.torch_threads: set[int] = set()
        self._lock = Lock()

    def encode(self, images: Sequence[LoadedImage]) -> list[Encoding]:
        with self._lock:
            self.batches.append([image.record.name for image in images])
            self.torch_threads.add(torch.get_num_threads())
        return [
            Encoding(
                tokens=image.pixels[:1, 0].astype(np.float16),
                xy=np.zeros((1, 2), np.float32),
                attention=np.ones(1, np.float32),
                transform=image.transform,
                network_size=(image.pixels.shape[1], image.pixels.shape[0]),
            )
            for image in images
        ]

    @property
    def names(self) -> list[str]:
        return sorted(name for batch in self.batches for name in batch)


def colour(number: int) -> tuple[int, int, int]:
    return 10 * number, 200, 255 - number


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    """Photos of one colour each."""
    found = []
    for number in range(PHOTOS):
        Image.new("RGB", (8, 6), colour(number)).save(tmp_path / f"{number}.png")
        found.append(ImageRecord(name=f"{number}.png", width_px=8, height_px=6, sha256=f"{number:064d}"))
    return found


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three photos each."""
    monkeypatch.setattr(module, "IMAGES_PER_CHUNK", 3)
    monkeypatch.setattr(storage, "IMAGES_PER_CHUNK", 3)


def encoder(root: Path, records: Sequence[ImageRecord], model: Colours, threads: int = 2) -> Encoder:
    return Encoder(model=model, root=root, records=records, threads=threads)


def run(
    root: Path, records: Sequence[ImageRecord], model: Colours, threads: int = 2
) -> tuple[list[Encoding], int, Listener]:
    listener = Listener()
    cache = StageCache(root / "cache", "encode", "key", listener)
    encodings, resumed = encoder(root, records, model, threads).encode("some", cache, listener)
    assert len(encodings) == len(records)
    return list(encodings), resumed, listener


def assert_right(encodings: Sequence[Encoding]) -> None:
    for number, found in enumerate(encodings):
        np.testing.assert_array_equal(found.tokens, [colour(number)])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("images_at_once", [1, 2, 3, 10])
def test_every_photo_is_encoded_once_and_stands_in_its_place(
    tmp_path: Path, records: list[ImageRecord], images_at_once: int, threads: int
) -> None:
    model = Colours(images_at_once)
    encodings, resumed, listener = run(tmp_path, records, model, threads)
    assert_right(encodings)
    assert resumed == 0
    assert model.names == [record.name for record in records]
    assert listener.started == [("some", PHOTOS, "image")]
    assert (listener.steps, listener.finished) == (PHOTOS, 1)


@pytest.mark.parametrize(
    ("images_at_once", "sizes"), [(1, [1] * 7), (2, [2, 1, 2, 1, 1]), (3, [3, 3, 1]), (10, [3, 3, 1])]
)
def test_batches_are_as_large_as_the_model_wants_them(
    tmp_path: Path, records: list[ImageRecord], images_at_once: int, sizes: list[int]
) -> None:
    """Within a chunk; one by one, photos are encoded side by side, each on one thread."""
    model = Colours(images_at_once)
    before = torch.get_num_threads()
    run(tmp_path, records, model, threads=3)
    assert [len(batch) for batch in model.batches] == sizes
    assert model.torch_threads == {1 if images_at_once == 1 else 3}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("images_at_once", [1, 2])
def test_finished_chunks_are_not_done_again(tmp_path: Path, records: list[ImageRecord], images_at_once: int) -> None:
    run(tmp_path, records, Colours(images_at_once))
    again = Colours(images_at_once)
    encodings, resumed, listener = run(tmp_path, records, again)
    assert_right(encodings)
    assert resumed == CHUNKS
    assert again.batches == []
    assert listener.steps == PHOTOS
    chunks = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(chunks) == CHUNKS
    chunks[1].write_bytes(chunks[1].read_bytes()[:-10])
    third = Colours(images_at_once)
    encodings, resumed, listener = run(tmp_path, records, third)
    assert_right(encodings)
    assert resumed == CHUNKS - 1
    assert third.names == ["3.png", "4.png", "5.png"]
    assert len(listener.warnings) == 1


@pytest.mark.parametrize("images_at_once", [1, 2])
def test_an_error_leaves_the_finished_chunks(tmp_path: Path, records: list[ImageRecord], images_at_once: int) -> None:
    photo = (tmp_path / "4.png").read_bytes()
    (tmp_path / "4.png").write_bytes(photo[:30])
    before = torch.get_num_threads()
    with pytest.raises(InputError, match=r"4\.png"):
        run(tmp_path, records, Colours(images_at_once))
    assert torch.get_num_threads() == before
    (tmp_path / "4.png").write_bytes(photo)
    model = Colours(images_at_once)
    encodings, resumed, _ = run(tmp_path, records, model)
    assert_right(encodings)
    assert resumed == 1
    assert model.names == ["3.png", "4.png", "5.png", "6.png"]


def test_the_key_follows_from_what_the_photos_hold_and_how_they_are_encoded(
    tmp_path: Path, records: list[ImageRecord]
) -> None:
    key = encoder(tmp_path, records, Colours()).key
    assert encoder(tmp_path / "elsewhere", records, Colours(4), threads=1).key == key
    other_model, other_size = Colours(), Colours()
    other_model.fingerprint = "1" * 64
    other_size.preparation = Preparation(size_px=16)
    changed = [replace(records[2], **{name: value}) for name, value in (("sha256", "f" * 64), ("orientation", 6))]
    keys = {
        encoder(tmp_path, records, other_model).key,
        encoder(tmp_path, records, other_size).key,
        encoder(tmp_path, records[:-1], Colours()).key,
        encoder(tmp_path, records[::-1], Colours()).key,
        *(encoder(tmp_path, [*records[:2], record, *records[3:]], Colours()).key for record in changed),
    }
    assert len(keys | {key}) == 7


def test_torch_gets_its_threads_back() -> None:
    before = torch.get_num_threads()
    seen = []

    def fail() -> None:
        with torch_threads(before + 1):
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
