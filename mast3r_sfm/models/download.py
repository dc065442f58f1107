"""Downloads of official weights from the hub: resumed where they were cut off, and compared with the hub's hashes.

The hub's client looks files up and opens connections. The bytes are taken from it here, since its own download starts
from the beginning after an interruption.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import http
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from mast3r_sfm import __version__
from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.weights import (
    FOLDER_VARIABLE,
    HUB_FILES,
    LICENSE,
    RECORD,
    OfficialWeights,
    Record,
    find_weights,
    hub_folder,
    official_weights,
    path_by_hand,
)
from mast3r_sfm.progress import Progress, SilentProgress, steps

_LIBRARY: Final[dict[str, Any]] = {"library_name": "mast3r-sfm", "library_version": __version__}
_MB = 1_000_000
# What is lost when a connection breaks is at most this.
_CHUNK_BYTES = 2**16
_TIMEOUT_S = 15.0
# Attempts in a row that bring nothing, and how long to wait before each.
_ATTEMPTS = 4
_PAUSE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class _RemoteFile:
    """A file as the hub describes it."""

    name: str
    url: str
    revision: str
    size_bytes: int
    digest: str
    """sha256 of a large file; of a small one, the sha1 by which git knows it."""

    @property
    def is_large(self) -> bool:
        return len(self.digest) == hashlib.sha256().digest_size * 2


class _HubError(Exception):
    """The hub did not give what was asked for."""

    def __init__(self, reason: str, *, passing: bool) -> None:
        """`passing` where another attempt may go better."""
        super().__init__(reason)
        self.passing = passing


def download_weights(name: str, *, license_accepted: bool, progress: Progress | None = None) -> Path:
    """Get official weights from the hub; does nothing where they are installed.

    What an interrupted download brought is kept, and the next one goes on from there. Progress is counted in MB.

    Args:
        name: of the catalogue.
        license_accepted: the user agrees to `OfficialWeights.license_note`; this is recorded beside the files.
        progress: where to report to.

    Returns:
        the weights, as `read_checkpoint` takes them.

    Raises:
        WeightsError: there are no such weights, the licence is not accepted, the hub cannot be reached or does not
            give them, they are not what the hub says, or they cannot be written. It says where to get them by hand.
    """
    weights = official_weights(name)
    if (path := find_weights(name)) is not None:
        return path
    if not license_accepted:
        raise WeightsError(f"the licence of the weights {name} ({LICENSE}) must be accepted before they are downloaded")
    folder = hub_folder(weights)
    try:
        with _quiet_hub():
            _download(weights, folder, progress or SilentProgress())
    except _HubError as error:
        raise WeightsError(
            f"cannot download the weights {name}: {error}; to do without the hub, get "
            f"{weights.url} by hand and put it at {path_by_hand(weights)}"
        ) from error
    except OSError as error:
        raise WeightsError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; free the space, or set "
            f"{FOLDER_VARIABLE} to another folder"
        ) from error
    return folder


def _download(weights: OfficialWeights, folder: Path, progress: Progress) -> None:
    files = _look_up(weights)
    folder.mkdir(parents=True, exist_ok=True)
    with steps(progress, "download", sum(file.size_bytes for file in files) // _MB, "MB"):
        parts = [_fetch(file, folder, progress) for file in files]
    record = Record(
        name=weights.name,
        repo=weights.repo,
        revision=files[0].revision,
        license=LICENSE,
        license_accepted=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sha256={
            file.name: file.digest if file.is_large else _sha256(part) for file, part in zip(files, parts, strict=True)
        },
    )
    temporary = folder / f".{RECORD}.part"
    temporary.write_text(record.to_json(), encoding="utf-8")
    # The record before the weights: whoever finds these finds it too.
    for source, name in ((temporary, RECORD), *zip(parts, HUB_FILES, strict=True)):
        source.replace(folder / name)


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """While this holds, the hub's client tells the hub nothing of this machine that a download does not need."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before


def _look_up(weights: OfficialWeights) -> list[_RemoteFile]:
    """What the hub says of the files, all of one commit."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    files: list[_RemoteFile] = []
    for name in HUB_FILES:
        revision = files[0].revision if files else None
        try:
            found = get_hf_file_metadata(
                hf_hub_url(weights.repo, name, revision=revision), timeout=_TIMEOUT_S, **_LIBRARY
            )
        except Exception as error:  # the client passes on what its HTTP library raises, and has changed that library
            raise _hub_error(error) from error
        revision, digest = revision or found.commit_hash, found.etag or ""
        if not revision or found.size is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
            raise _HubError(f"the hub does not state commit, size and hash of {name}", passing=False)
        url = hf_hub_url(weights.repo, name, revision=revision)
        files.append(_RemoteFile(name=name, url=url, revision=revision, size_bytes=found.size, digest=digest))
    return files


def _fetch(file: _RemoteFile, folder: Path, progress: Progress) -> Path:
    """Download a file, or the rest of it, under a temporary name; returns its path once it is what it should be."""
    part = folder / f".{file.name}.{file.digest[:16]}.part"
    for other in folder.glob(f".{file.name}.*.part"):
        if other != part:
            other.unlink(missing_ok=True)  # of a revision that the hub has replaced
    with _open_alone(part) as stream:
        if stream.seek(0, os.SEEK_END) > file.size_bytes:
            stream.seek(0)
            stream.truncate()
        missing, free = file.size_bytes - stream.tell(), shutil.disk_usage(folder).free
        if missing > free:
            raise WeightsError(
                f"{folder} has {free / 1e9:.1f} GB of free space, but {missing / 1e9:.1f} GB are needed: free the "
                f"space, or set {FOLDER_VARIABLE} to a folder on another disk"
            )
        _fill(file, stream, progress)
        stream.flush()
        if (_sha256(part) if file.is_large else _git_sha1(part)) != file.digest:
            part.unlink()
            raise _HubError(f"{file.name} arrived damaged and was removed; try again", passing=False)
    return part


@contextlib.contextmanager
def _open_alone(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading and writing, made where it is absent, which no other process may do at the same time."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WeightsError(f"another process is downloading {path}; wait until it is done") from error
        except OSError:
            pass  # a file system without locks
        yield stream


def _fill(file: _RemoteFile, stream: BinaryIO, progress: Progress) -> None:
    """Append what `stream` lacks, with further attempts where the connection breaks."""
    attempts, shown = 0, 0
    while (position := stream.tell()) < file.size_bytes:
        try:
            for offset, chunk in _receive(file, position):
                if stream.tell() != offset:  # the server starts anew
                    stream.seek(offset)
                    stream.truncate()
                stream.write(chunk)
                if (megabytes := stream.tell() // _MB) > shown:
                    progress.advance(megabytes - shown)
                    shown = megabytes
            if stream.tell() < file.size_bytes:
                raise _HubError("the connection was closed early", passing=True)
        except _HubError as error:
            attempts = 0 if stream.tell() > position else attempts + 1
            if not error.passing or attempts == _ATTEMPTS:
                raise
            time.sleep(_PAUSE_S)
    progress.advance(max(0, file.size_bytes // _MB - shown))


def _receive(file: _RemoteFile, position: int) -> Iterator[tuple[int, bytes]]:
    """The file's bytes from `position` on, in chunks, each with its offset; from 0 where the server wants it so."""
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, but looked up late

    headers = {**build_hf_headers(**_LIBRARY), "Accept-Encoding": "identity"}
    if position:
        headers["Range"] = f"bytes={position}-"
    try:
        with get_session().stream(
            "GET", file.url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            offset = position if response.status_code == http.HTTPStatus.PARTIAL_CONTENT else 0
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                yield offset, chunk
                offset += len(chunk)
    except Exception as error:  # as in _look_up
        raise _hub_error(error) from error


def _hub_error(error: Exception) -> _HubError:
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return _HubError("HF_HUB_OFFLINE forbids it; unset it", passing=False)
    if isinstance(error, errors.GatedRepoError):
        return _HubError("the hub asks for an account that has agreed to their terms; see hf auth login", passing=False)
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.EntryNotFoundError):
        return _HubError("the hub does not have them", passing=False)
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return _HubError(f"the hub answers with status {status}", passing=status >= 500 or status in (408, 429))
    reason = str(error).partition("\n")[0] or type(error).__name__
    return _HubError(f"the hub cannot be reached ({reason})", passing=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _git_sha1(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
