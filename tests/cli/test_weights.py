"""`weights`: list, where, download, verify."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mast3r_sfm.models.weights import CATALOGUE, hub_folder, official_weights, path_by_hand
from tests.checkpoints import DUST3R, model_text, random_tensors, write_hub_folder, write_pth
from tests.hub import Hub, serve

NAME = "dust3r-224-linear"
MODEL = "model.safetensors"
ACTIONS = ("list", "where", "download", "verify")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of weights, for this process and those that it starts."""
    folder = tmp_path / "weights"
    monkeypatch.setenv("MAST3R_SFM_WEIGHTS", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub for the commands that are started as processes."""
    sizes = {**DUST3R, "enc_embed_dim": 64, "dec_embed_dim": 64}
    published = write_hub_folder(tmp_path / "published", sizes, random_tensors(sizes))
    with serve(Hub(files={path.name: path.read_bytes() for path in published.iterdir()})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_list(run_here: Callable[..., Any], folder: Path) -> None:
    result = run_here("weights", "list")
    assert result.code == 0
    assert all(name in result.out for name in CATALOGUE)
    assert result.out.count("not installed") == len(CATALOGUE)
    assert result.out.count("CC BY-NC-SA 4.0") == len(CATALOGUE)
    assert "2.8 GB" in result.out
    by_hand = path_by_hand(official_weights("dust3r"))
    folder.mkdir()
    by_hand.touch()
    listed = run_here("weights", "list").out
    assert f"installed: {by_hand}" in listed
    assert listed.count("not installed") == len(CATALOGUE) - 1
    assert "retrieval" not in listed
    stem = official_weights("dust3r").stem
    for end in ("trainingfree.pth", "codebook.pkl"):
        assert "retrieval files" not in run_here("weights", "list").out
        (folder / f"{stem}_retrieval_{end}").touch()
    listed = run_here("weights", "list").out
    assert f"with retrieval files: {folder / f'{stem}_retrieval_trainingfree.pth'}" in listed


def test_list_as_json(run_here: Callable[..., Any], folder: Path) -> None:
    folder.mkdir()
    path_by_hand(official_weights("dust3r")).touch()
    listed = run_here("weights", "list", "--json").json
    assert listed["folder"] == str(folder)
    entries = {entry["name"]: entry for entry in listed["weights"]}
    assert entries.keys() == CATALOGUE.keys()
    assert entries["mast3r"]["installed"] is None
    assert entries["dust3r"]["installed"] == str(path_by_hand(official_weights("dust3r")))
    assert entries["dust3r"]["retrieval"] is None
    assert entries["mast3r"]["retrieval"] is None
    assert 2.7e9 < entries["mast3r"]["size_bytes"] < 2.8e9
    assert entries["mast3r"]["url"].endswith("_metric.pth")
    assert entries["mast3r"]["license"] == "CC BY-NC-SA 4.0"


def test_where(run_here: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run_here("weights", "where")
    assert (result.code, result.out, result.err) == (0, f"{folder}\n", "")
    monkeypatch.delenv("MAST3R_SFM_WEIGHTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run_here("weights", "where")
    assert result.out == f"{tmp_path / 'mast3r-sfm' / 'weights'}\n"
    assert "MAST3R_SFM_WEIGHTS" in result.err


def test_without_acceptance_the_licence_is_printed_and_nothing_else_happens(
    run_command: Callable[..., Any], hub: Hub, folder: Path
) -> None:
    result = run_command("weights", "download", "mast3r")
    assert result.code == 2
    assert "CC BY-NC-SA 4.0" in result.out
    assert "Non-commercial" in result.out
    assert "map-free" in result.out
    assert "add --accept-license" in result.err
    assert result.err.count("\n") == 1
    assert hub.requests == []
    assert not folder.exists()


def test_a_download(run_command: Callable[..., Any], hub: Hub, folder: Path) -> None:
    result = run_command("weights", "download", NAME, "--accept-license")
    assert result.code == 0, result.err
    assert result.err == ""
    assert "Non-commercial" in result.out
    installed = hub_folder(official_weights(NAME))
    assert installed.parent == folder
    assert f"path         {installed}\n" in result.out
    assert f"sha256       {hub.digest(MODEL)}  {MODEL}\n" in result.out
    assert "the sha256 agree with those of the download" in result.out
    assert "head linear, images of 224 px, encoder 64 × 2, decoder 64 × 3" in result.out
    assert result.out.endswith("in order\n")
    hub.requests.clear()
    again = run_command("weights", "download", NAME)
    assert again.code == 0
    assert f"{NAME} is installed already: {installed}" in again.out
    assert f"mast3r-sfm weights verify {NAME}" in again.out
    assert hub.requests == []


def test_an_interrupted_download_goes_on(run_command: Callable[..., Any], hub: Hub) -> None:
    hub.hang_after = 500_000
    program = [sys.executable, "-m", "mast3r_sfm_cli.main", "weights", "download", NAME, "--accept-license"]
    with subprocess.Popen(
        program,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a shell, they were started with this signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        part = hub_folder(official_weights(NAME)) / f".{MODEL}.{hub.digest(MODEL)[:16]}.part"
        for _ in range(600):
            if part.exists() and part.stat().st_size > 400_000:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "goes on where it stopped" in err
    kept = part.stat().st_size
    assert 400_000 < kept <= 500_000
    hub.hang_after = None
    hub.released.set()
    hub.requests.clear()
    result = run_command("weights", "download", NAME, "--accept-license")
    assert result.code == 0, result.err
    (request,) = hub.downloads(MODEL)
    assert {name.lower(): value for name, value in request.headers.items()}["range"] == f"bytes={kept}-"


def test_what_the_hub_refuses_is_one_line(run_command: Callable[..., Any], hub: Hub) -> None:
    hub.refuse = (401, "RepoNotFound")
    result = run_command("weights", "download", "mast3r", "--accept-license", "--quiet")
    assert result.code == 2
    assert result.err.count("\n") == 1
    entry = official_weights("mast3r")
    assert f"get {entry.url} by hand and put it at {path_by_hand(entry)}" in result.err


def test_verify(run_here: Callable[..., Any], folder: Path) -> None:
    folder.mkdir()
    path = write_pth(path_by_hand(official_weights(NAME)), model_text(DUST3R), random_tensors(DUST3R))
    for target in (NAME, path):
        result = run_here("weights", "verify", target)
        assert result.code == 0
        assert "no record of a download" in result.out
        assert f"{path.name}\n" in result.out
        assert "descriptors  none" in result.out
    path.write_bytes(path.read_bytes()[:-1000])
    result = run_here("weights", "verify", NAME)
    assert result.code == 2
    assert result.out == ""
    assert str(path) in result.err
    assert result.err.count("\n") == 1


def test_verify_says_what_is_missing(run_here: Callable[..., Any]) -> None:
    for arguments, part in (
        (("verify", "mast3r"), "mast3r-sfm weights download mast3r"),
        (("verify", "gone.pth"), "gone.pth"),
        (("download", "mastr"), "did you mean mast3r?"),
        (("verify",), "Missing argument"),
        (("remove",), "No such command"),
    ):
        result = run_here("weights", *arguments)
        assert result.code == 2
        assert part in result.err
        assert result.err.count("\n") == 1


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_has_help(action: str, run_here: Callable[..., Any]) -> None:
    result = run_here("weights", action, "--help")
    assert result.code == 0
    assert result.out.startswith(f"Usage: mast3r-sfm weights {action}")


def test_no_action_waits_for_torch_where_it_is_not_needed() -> None:
    program = (
        "import sys; from mast3r_sfm_cli.main import run\n"
        "for arguments in (['list'], ['list', '--json'], ['where'], ['download', 'mast3r'], ['verify', 'mast3r']):\n"
        "    run(['weights', *arguments])\n"
        "heavy = {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_the_environment_is_left_as_it_is(run_here: Callable[..., Any]) -> None:
    before = dict(os.environ)
    run_here("weights", "list")
    run_here("weights", "download", "mast3r")
    assert dict(os.environ) == before
    assert json.loads(run_here("weights", "list", "--json").out)["weights"]
