"""Encodings on disk: what comes back, and how much of it stays in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.errors import ArtifactError
from mast3r_sfm.storage import encodings as module
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.storage.encodings import (
    CHUNKS_IN_MEMORY,
    IMAGES_PER_CHUNK,
    NumberedEncodings,
    StoredEncodings,
    pack,
    unpack,
)
from mast3r_sfm.types import Encoding, PixelTransform
from tests.exact import Listener


def encoding(number: int) -> Encoding:
    """Each with another number of tokens, one in seven without any."""
    rng = np.random.default_rng(number)
    count = number % 7
    matrix = np.array([[1.0 + number, 0.0, 0.5], [0.0, 2.0 + number, -1.0]])
    return Encoding(
        tokens=rng.normal(size=(count, 8)).astype(np.float16),
        xy=rng.uniform(0, 100, (count, 2)).astype(np.float32),
        attention=rng.random(count).astype(np.float32),
        transform=PixelTransform(matrix=matrix),
        network_size=(640 + number, 480),
    )


def assert_same(one: Encoding, two: Encoding) -> None:
    for name in ("tokens", "xy", "attention"):
        left, right = getattr(one, name), getattr(two, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(one.transform.matrix, two.transform.matrix)
    assert one.network_size == two.network_size


class CountingCache(StageCache):
    """Remembers which chunks were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "encode", "key", Listener())
        self.reads: list[int] = []

    def read(self, chunk: int):
        self.reads.append(chunk)
        return super().read(chunk)


def fill(root: Path, count: int) -> CountingCache:
    cache = CountingCache(root)
    for chunk, start in enumerate(range(0, count, IMAGES_PER_CHUNK)):
        cache.write(chunk, *pack([encoding(number) for number in range(start, min(start + IMAGES_PER_CHUNK, count))]))
    return cache


@pytest.mark.parametrize("count", [1, 2, 20])
def test_unpacking_undoes_packing(count: int) -> None:
    originals = [encoding(number) for number in range(count)]
    arrays, meta = pack(originals)
    back = unpack(arrays, meta)
    assert len(back) == count
    for one, two in zip(originals, back, strict=True):
        assert_same(one, two)


def test_every_image_is_found_in_its_chunk(tmp_path: Path) -> None:
    count = 2 * IMAGES_PER_CHUNK + 5
    stored = StoredEncodings(fill(tmp_path, count), count)
    assert len(stored) == count
    for number in (0, 1, IMAGES_PER_CHUNK - 1, IMAGES_PER_CHUNK, 2 * IMAGES_PER_CHUNK, count - 1):
        assert_same(stored[number], encoding(number))
        assert_same(stored[number - count], encoding(number))
    for number, found in enumerate(stored[62:67]):
        assert_same(found, encoding(62 + number))
    assert len(list(stored)) == count


@pytest.mark.parametrize("index", [3, -4, 100])
def test_an_image_that_is_not_there(tmp_path: Path, index: int) -> None:
    with pytest.raises(IndexError, match="of 3"):
        StoredEncodings(fill(tmp_path, 3), 3)[index]


def test_chunks_are_read_when_needed_and_kept(tmp_path: Path) -> None:
    cache = fill(tmp_path, 130)
    stored = StoredEncodings(cache, 130)
    assert cache.reads == []
    for number in (70, 71, 3, 127, 0):
        assert_same(stored[number], encoding(number))
    assert cache.reads == [1, 0]


def test_only_the_chunks_used_last_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGES_PER_CHUNK", 2)
    cache = CountingCache(tmp_path)
    chunks = CHUNKS_IN_MEMORY + 1
    for chunk in range(chunks):
        cache.write(chunk, *pack([encoding(2 * chunk), encoding(2 * chunk + 1)]))
    stored = StoredEncodings(cache, 2 * chunks)
    for number in range(0, 2 * (chunks - 1), 2):  # all but the last: memory is full
        assert_same(stored[number], encoding(number))
    assert_same(stored[1], encoding(1))  # the first chunk was used last
    assert_same(stored[2 * chunks - 1], encoding(2 * chunks - 1))  # so that the second makes room
    assert cache.reads == list(range(chunks))
    assert_same(stored[0], encoding(0))
    assert cache.reads == list(range(chunks))
    assert_same(stored[2], encoding(2))
    assert cache.reads == [*range(chunks), 1]


@pytest.mark.parametrize("damage", ["gone", "truncated"])
def test_a_chunk_that_is_gone_is_an_error(tmp_path: Path, damage: str) -> None:
    cache = fill(tmp_path, 130)
    path = sorted(cache.folder.glob("*.safetensors"))[1]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:50])
    stored = StoredEncodings(cache, 130)
    assert_same(stored[5], encoding(5))
    with pytest.raises(ArtifactError, match="chunk 1 is gone; run the command again"):
        stored[64]


def test_encodings_of_some_images_are_found_by_their_numbers(tmp_path: Path) -> None:
    cache = fill(tmp_path, 70)
    images = [3, 200, *range(300, 367), 12]  # in any order
    numbered = NumberedEncodings(images, StoredEncodings(cache, 70))
    assert len(numbered) == 70
    assert list(numbered) == images
    assert cache.reads == []  # nothing is read before it is needed
    for image, row in ((3, 0), (200, 1), (300, 2), (366, 68), (12, 69)):
        assert_same(numbered[image], encoding(row))
    assert cache.reads == [0, 1]


@pytest.mark.parametrize("image", [0, -1, 5, 64])
def test_an_image_without_an_encoding(image: int) -> None:
    numbered = NumberedEncodings([4, 6], [encoding(1), encoding(2)])
    assert image not in numbered
    assert numbered.get(image) is None
    with pytest.raises(KeyError):
        numbered[image]
    assert 6 in numbered
    assert len(NumberedEncodings([], [])) == 0
