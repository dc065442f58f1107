"""Finished work on disk: written to a temporary name, flushed, renamed; read back only when whole.

    OUT/cache/<stage>/<key>/manifest.json
    OUT/cache/<stage>/<key>/00000.safetensors   one file per chunk

A chunk is the unit of resume. A file that is half-written, truncated or of another version counts as absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mast3r_sfm.errors import ArtifactError
from mast3r_sfm.progress import Progress

Arrays = dict[str, NDArray[Any]]


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` afterwards is either whole or as it was before.

    Raises:
        ArtifactError: the folder cannot be written or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            # mkstemp makes files private to the user; results are shared like any other file of theirs.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror}; free the space or choose another folder"
        ) from error


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically, indented, in UTF-8."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


class StageCache:
    """The chunks of one stage under one key."""

    def __init__(self, root: Path, stage: str, key: str, progress: Progress) -> None:
        self.stage = stage
        self.key = key
        self.folder = root / stage / key
        self._progress = progress

    def describe(self, manifest: Mapping[str, object]) -> None:
        """Write manifest.json: what the key was made of, for people."""
        write_json(self.folder / "manifest.json", {"stage": self.stage, "key": self.key, **manifest})

    def clear(self) -> None:
        """Forget all chunks."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, chunk: int, arrays: Arrays, meta: object = None) -> None:
        """Store a chunk: named arrays, and any JSON value beside them."""
        contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        text = json.dumps(meta, allow_nan=False)
        write_atomic(self._path(chunk), safetensors.numpy.save(contiguous, metadata={"meta": text}))

    def read(self, chunk: int) -> tuple[Arrays, Any] | None:
        """Read a chunk, or None where it is absent. A broken one is absent too, with a warning."""
        path = self._path(chunk)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                meta = json.loads((file.metadata() or {})["meta"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            self._progress.warn(f"{path} is broken ({error}); its part of the stage {self.stage} is done again")
            return None
        return arrays, meta

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.safetensors"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
