from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mast3r_sfm.errors import ArtifactError
from mast3r_sfm.progress import SilentProgress
from mast3r_sfm.storage.cache import StageCache, write_atomic, write_json

DTYPES = ["float16", "float32", "float64", "int32", "int64", "uint8", "uint16", "bool"]
ARRAYS = st.dictionaries(
    st.text("abcdefgh_", min_size=1),
    st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0))),
    max_size=3,
)
META = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


class Warnings(SilentProgress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, message: str) -> None:
        self.texts.append(message)


@pytest.fixture
def warnings() -> Warnings:
    return Warnings()


@pytest.fixture
def cache(tmp_path: Path, warnings: Warnings) -> StageCache:
    return StageCache(tmp_path, "match", "0123abcd", warnings)


def chunk_file(cache: StageCache) -> Path:
    return cache.folder / "00003.safetensors"


@given(arrays=ARRAYS, meta=META)
def test_what_is_written_is_read(
    arrays: dict[str, Any], meta: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    warnings = Warnings()
    cache = StageCache(tmp_path_factory.mktemp("cache"), "match", "key", warnings)
    cache.write(3, arrays, meta)
    back = cache.read(3)
    assert back is not None
    assert back[1] == meta
    assert back[0].keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[0][name].dtype == array.dtype
        np.testing.assert_array_equal(back[0][name], array, strict=True)
    assert warnings.texts == []


def test_views_are_stored_as_they_look(cache: StageCache) -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    cache.write(3, {"transposed": base.T, "strided": base[::-1, ::2], "broadcast": np.broadcast_to(base[0], (3, 6))})
    arrays, _ = cache.read(3) or ({}, None)
    np.testing.assert_array_equal(arrays["transposed"], base.T)
    np.testing.assert_array_equal(arrays["strided"], base[::-1, ::2])
    np.testing.assert_array_equal(arrays["broadcast"], np.stack([base[0]] * 3))


def test_absent_is_none_without_a_warning(cache: StageCache, warnings: Warnings) -> None:
    cache.write(2, {"x": np.zeros(2)})
    assert cache.read(3) is None
    assert warnings.texts == []


def test_keys_and_stages_do_not_mix(tmp_path: Path, warnings: Warnings) -> None:
    StageCache(tmp_path, "match", "one", warnings).write(0, {}, "first")
    StageCache(tmp_path, "match", "two", warnings).write(0, {}, "second")
    assert StageCache(tmp_path, "match", "one", warnings).read(0) == ({}, "first")
    assert StageCache(tmp_path, "match", "two", warnings).read(0) == ({}, "second")
    assert StageCache(tmp_path, "encode", "one", warnings).read(0) is None


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_chunk_is_absent_with_a_warning(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    warnings = Warnings()
    cache = StageCache(tmp_path_factory.mktemp("cache"), "match", "key", warnings)
    cache.write(3, {"xy": np.ones((50, 2)), "confidence": np.ones(50, np.float32)}, {"verdict": "good"})
    whole = chunk_file(cache).read_bytes()
    chunk_file(cache).write_bytes(whole[: int(share * len(whole))])
    assert cache.read(3) is None
    (text,) = warnings.texts
    assert str(chunk_file(cache)) in text
    assert "match is done again" in text
    cache.write(3, {"xy": np.zeros((1, 2))})
    assert cache.read(3) is not None


def without_meta(path: Path) -> None:
    header = b"{}".ljust(8)
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"\0" * 4096),
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(4096)),
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
        lambda path: path.write_text("PK not a chunk"),
        without_meta,
    ],
    ids=["zeros", "noise", "longer", "text", "another writer's"],
)
def test_a_foreign_file_is_absent_with_a_warning(
    spoil: Callable[[Path], object], cache: StageCache, warnings: Warnings
) -> None:
    cache.write(3, {"x": np.arange(5)})
    spoil(chunk_file(cache))
    assert cache.read(3) is None
    assert len(warnings.texts) == 1


def test_nan_in_the_meta_is_refused_and_leaves_nothing(cache: StageCache) -> None:
    with pytest.raises(ValueError, match="JSON"):
        cache.write(3, {}, {"ratio": float("nan")})
    assert not chunk_file(cache).exists()


def test_the_manifest_is_readable_json(cache: StageCache) -> None:
    cache.describe({"config": {"min_inliers": 30}, "names": ["Übersicht 1.jpg"]})
    text = (cache.folder / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(text) == {
        "stage": "match",
        "key": "0123abcd",
        "config": {"min_inliers": 30},
        "names": ["Übersicht 1.jpg"],
    }
    assert "Übersicht" in text


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from mast3r_sfm.storage import cache

moment, path = sys.argv[1], Path(sys.argv[2])

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "before the flush":
    cache.os.fsync = die
else:
    cache.Path.replace = die
cache.write_atomic(path, b"new" * 100_000)
"""


@pytest.mark.parametrize("moment", ["before the flush", "before the rename"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_killed_writer_leaves_what_was_there(moment: str, before: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "00003.safetensors"
    if before is not None:
        path.write_bytes(before)
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, moment, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (path.read_bytes() if path.exists() else None) == before
    write_atomic(path, b"again")
    assert path.read_bytes() == b"again"


def test_a_full_disk_is_said_and_leaves_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "run.json"
    write_atomic(path, b"old")
    monkeypatch.setattr("mast3r_sfm.storage.cache.os.fsync", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*run\.json: No space left.*free the space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_an_interrupt_passes_through_and_leaves_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mast3r_sfm.storage.cache.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "run.json", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot write"):
        write_atomic(tmp_path / "file" / "run.json", b"new")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_results_have_the_rights_of_any_other_file(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_json(tmp_path / "run.json", {"seed": 0})
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_json_of_nan_is_refused_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"seconds": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "run.json", {"seconds": float("inf")})
    assert json.loads((tmp_path / "run.json").read_text()) == {"seconds": 1.5}
