"""Downloads from a hub on this machine: whole, resumed, refused."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models import download
from mast3r_sfm.models.download import download_weights
from mast3r_sfm.models.weights import hub_folder, official_weights, verify_weights
from mast3r_sfm.progress import SilentProgress
from tests.checkpoints import DUST3R, random_tensors, write_hub_folder
from tests.hub import REVISION, Hub, serve

NAME = "dust3r-512-linear"
MODEL = "model.safetensors"


class Counted(SilentProgress):
    """Adds up what is reported."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.done = 0
        self.finished = 0

    def start(self, stage: str, total: int, unit: str) -> None:
        assert (stage, unit) == ("download", "MB")
        self.totals.append(total)

    def advance(self, steps: int = 1) -> None:
        assert steps >= 0
        self.done += steps

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Config and weights; these are some MB, so that they come in several chunks."""
    sizes = {**DUST3R, "enc_embed_dim": 128, "dec_embed_dim": 96}
    folder = write_hub_folder(tmp_path_factory.mktemp("published"), sizes, random_tensors(sizes))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert 3_000_000 < len(files[MODEL]) < 10_000_000
    return files


@pytest.fixture
def hub(published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has the weights, and that the client asks in place of the real one."""
    with serve(Hub(files=dict(published))) as hub:
        ask(hub.url, monkeypatch)
        yield hub
    huggingface_hub.close_session()


def ask(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub.close_session()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the weights should go."""
    monkeypatch.setenv("MAST3R_SFM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub_folder(official_weights(NAME))


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.part"))


def refused(part: str) -> str:
    with pytest.raises(WeightsError, match=part) as raised:
        download_weights(NAME, license_accepted=True)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.usefixtures("hub")
def test_a_whole_download(folder: Path, published: dict[str, bytes]) -> None:
    progress = Counted()
    assert download_weights(NAME, license_accepted=True, progress=progress) == folder
    assert {path.name for path in folder.iterdir()} == {"config.json", MODEL, "source.json"}
    for name, content in published.items():
        assert (folder / name).read_bytes() == content
        assert (folder / name).stat().st_mode & stat.S_IRUSR
    assert progress.totals == [sum(map(len, published.values())) // 1_000_000]
    assert progress.done == progress.totals[0] > 2
    assert progress.finished == 1
    found = verify_weights(NAME)
    assert found.record is not None
    assert (found.record.repo, found.record.revision) == ("naver/DUSt3R_ViTLarge_BaseDecoder_512_linear", REVISION)
    assert found.record.license == "CC BY-NC-SA 4.0"
    assert found.record.license_accepted.startswith("20")
    assert found.record.sha256 == found.sha256


def test_the_hub_is_asked_for_two_files_and_told_nothing_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    download_weights(NAME, license_accepted=True)
    repo = "/naver/DUSt3R_ViTLarge_BaseDecoder_512_linear/resolve"
    assert [(request.method, request.path) for request in hub.requests] == [
        ("HEAD", f"{repo}/main/config.json"),
        # All files are of one commit, even where a new one comes in between.
        ("HEAD", f"{repo}/{REVISION}/{MODEL}"),
        ("GET", f"{repo}/{REVISION}/config.json"),
        ("GET", f"{repo}/{REVISION}/{MODEL}"),
    ]
    for request in hub.requests:
        agent = {name.lower(): value for name, value in request.headers.items()}["user-agent"]
        assert agent.startswith("mast3r-sfm/")
        assert "torch" not in agent
    assert constants.HF_HUB_DISABLE_TELEMETRY is False


def test_what_is_installed_is_left_alone(hub: Hub, folder: Path) -> None:
    download_weights(NAME, license_accepted=True)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    hub.requests.clear()
    assert download_weights(NAME, license_accepted=False) == folder
    assert hub.requests == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_nothing_happens_before_the_licence_is_accepted(hub: Hub, folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"licence .* must be accepted"):
        download_weights(NAME, license_accepted=False)
    assert hub.requests == []
    assert not folder.exists()


def test_a_broken_connection_is_taken_up_again(hub: Hub, folder: Path, published: dict[str, bytes]) -> None:
    hub.break_after = [1_500_000, 0, 0, 700_000]
    progress = Counted()
    download_weights(NAME, license_accepted=True, progress=progress)
    assert (folder / MODEL).read_bytes() == published[MODEL]
    assert progress.done == progress.totals[0]
    ranges = [request.headers.get("Range") or request.headers.get("range") for request in hub.downloads(MODEL)]
    assert ranges[0] is None
    starts = [int(str(text).removeprefix("bytes=").rstrip("-")) for text in ranges[1:]]
    assert starts == sorted(starts)
    assert 1_400_000 <= starts[0] <= 1_500_000
    assert starts[0] == starts[1] == starts[2] < starts[3]


def test_an_interrupted_download_goes_on_where_it_stopped(hub: Hub, folder: Path, published: dict[str, bytes]) -> None:
    hub.break_after = [2_000_000, 0, 0, 0, 0]
    message = refused("cannot be reached|closed early")
    assert str(folder.parent / "DUSt3R_ViTLarge_BaseDecoder_512_linear.pth") in message
    assert "/DUSt3R/DUSt3R_ViTLarge_BaseDecoder_512_linear.pth by hand" in message
    assert not (folder / MODEL).exists()
    (kept,) = (path for path in parts(folder) if MODEL in path.name)
    size = kept.stat().st_size
    assert 1_900_000 <= size <= 2_000_000
    hub.requests.clear()
    progress = Counted()
    download_weights(NAME, license_accepted=True, progress=progress)
    (request,) = hub.downloads(MODEL)
    assert {name.lower(): value for name, value in request.headers.items()}["range"] == f"bytes={size}-"
    assert (folder / MODEL).read_bytes() == published[MODEL]
    assert progress.done == progress.totals[0]
    assert parts(folder) == []


def test_what_is_complete_is_not_downloaded_again(hub: Hub, folder: Path, published: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    (folder / f".{MODEL}.{hub.digest(MODEL)[:16]}.part").write_bytes(published[MODEL])
    download_weights(NAME, license_accepted=True)
    assert hub.downloads(MODEL) == []
    assert (folder / MODEL).read_bytes() == published[MODEL]


def test_a_server_that_starts_anew(hub: Hub, folder: Path, published: dict[str, bytes]) -> None:
    hub.break_after = [1_500_000]
    hub.ignore_ranges = True
    download_weights(NAME, license_accepted=True)
    assert len(hub.downloads(MODEL)) == 2
    assert (folder / MODEL).read_bytes() == published[MODEL]


@pytest.mark.parametrize("rest", ["of another revision", "too long"])
def test_rests_that_are_of_no_use(rest: str, hub: Hub, folder: Path, published: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    digest = "f" * 16 if rest == "of another revision" else hub.digest(MODEL)[:16]
    (folder / f".{MODEL}.{digest}.part").write_bytes(bytes(len(published[MODEL]) + 1))
    download_weights(NAME, license_accepted=True)
    assert (folder / MODEL).read_bytes() == published[MODEL]
    assert parts(folder) == []


@pytest.mark.parametrize("damage", ["hash", "rest", "config"])
def test_damaged_files_are_refused_and_removed(
    damage: str, hub: Hub, folder: Path, published: dict[str, bytes]
) -> None:
    if damage == "hash":
        hub.state_wrong_hash = True
    elif damage == "rest":
        folder.mkdir(parents=True)
        (folder / f".{MODEL}.{hub.digest(MODEL)[:16]}.part").write_bytes(b"x" * 1000)
    else:
        digest = hub.digest("config.json")
        folder.mkdir(parents=True)
        (folder / f".config.json.{digest[:16]}.part").write_bytes(b"x" * len(published["config.json"]))
    message = refused("arrived damaged and was removed; try again")
    assert ("config.json" if damage == "config" else MODEL) in message
    assert not (folder / MODEL).exists()
    assert not (folder / "source.json").exists()
    assert all(damage == "hash" or MODEL not in path.name for path in parts(folder))
    if damage != "hash":
        download_weights(NAME, license_accepted=True)
        assert (folder / MODEL).read_bytes() == published[MODEL]


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ((401, "RepoNotFound"), "the hub does not have them"),
        ((404, "EntryNotFound"), "the hub does not have them"),
        ((403, "GatedRepo"), "agreed to their terms"),
        ((403, ""), "status 403"),
        ((500, ""), "status 500"),
        ((503, ""), "status 503"),
    ],
)
def test_answers_of_the_hub_are_explained(answer: tuple[int, str], part: str, hub: Hub, folder: Path) -> None:
    hub.refuse = answer
    message = refused(part)
    assert f"by hand and put it at {folder.parent / 'DUSt3R_ViTLarge_BaseDecoder_512_linear.pth'}" in message
    assert len(hub.requests) == 1
    assert not folder.exists()


def test_a_file_that_goes_away_is_not_asked_for_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = download._look_up

    def then_refuse(*arguments: object) -> object:
        found = look_up(*arguments)  # type: ignore[arg-type]
        hub.refuse = (404, "EntryNotFound")
        return found

    monkeypatch.setattr(download, "_look_up", then_refuse)
    refused("the hub does not have them")
    assert len(hub.requests) == 3


def test_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Hub()) as gone:
        pass
    ask(gone.url, monkeypatch)
    message = refused("the hub cannot be reached")
    huggingface_hub.close_session()
    assert "by hand and put it at" in message
    assert not folder.exists()


def test_offline_mode_is_respected(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE")
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
def test_a_hub_that_states_no_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "digest", lambda *_: "weak")
    refused("does not state commit, size and hash of config.json")


def test_a_full_disk_is_said_before_the_download(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(Path(__file__))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    message = refused(r"0\.0 GB of free space, but .* are needed")
    assert str(folder) in message
    assert hub.downloads(MODEL) == []


@pytest.mark.usefixtures("hub")
def test_a_disk_that_fills_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_fill", full)
    assert str(folder) in refused("No space left on device; free the space, or set MAST3R_SFM_WEIGHTS")


@pytest.mark.usefixtures("hub")
def test_a_folder_that_cannot_be_made(folder: Path) -> None:
    folder.parent.write_text("a file", encoding="utf-8")
    assert "MAST3R_SFM_WEIGHTS" in refused("cannot write")


def test_two_downloads_at_the_same_time(hub: Hub, folder: Path) -> None:
    folder.mkdir(parents=True)
    part = folder / f".{MODEL}.{hub.digest(MODEL)[:16]}.part"
    with part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert str(part) in refused("another process is downloading")
        assert part.stat().st_size == 0
    download_weights(NAME, license_accepted=True)
    assert (folder / MODEL).stat().st_size > 1_000_000


@pytest.mark.usefixtures("hub")
def test_file_systems_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert download_weights(NAME, license_accepted=True) == folder


def test_the_record_is_plain_json(hub: Hub, folder: Path) -> None:
    download_weights(NAME, license_accepted=True)
    stored = json.loads((folder / "source.json").read_bytes())
    assert stored["name"] == NAME
    assert stored["sha256"][MODEL] == hub.digest(MODEL)
