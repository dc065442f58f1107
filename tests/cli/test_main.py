"""The command line as a whole: help, versions, exit codes, errors as text and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mast3r_sfm
from mast3r_sfm.errors import DivergedError, InputError, ReconstructionError, WeightsError
from mast3r_sfm_cli.main import cli, main, run

COMMANDS = [
    ["reconstruct"],
    ["triangulate"],
    ["register"],
    ["pairs"],
    ["compare"],
    ["align"],
    ["doctor"],
    ["config"],
    ["config", "show"],
    ["weights"],
]


def replace_pipeline(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "mast3r_sfm.pipeline", types.SimpleNamespace(reconstruct=function))


def test_help_and_version_as_a_process(run_command: Callable[..., Any]) -> None:
    result = run_command("--help")
    assert result.code == 0
    assert all(command[0] in result.out for command in COMMANDS)
    assert run_command("--version").out.split() == ["mast3r-sfm,", "version", mast3r_sfm.__version__]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"Usage: mast3r-sfm {' '.join(command)}")
    assert err == ""


def test_all_commands_are_tested() -> None:
    assert set(cli.commands) == {command[0] for command in COMMANDS}


def test_help_waits_for_no_heavy_library() -> None:
    program = (
        "import sys; from mast3r_sfm_cli.main import run\n"
        f"for command in {[[], *COMMANDS]}:\n"
        "    run([*command, '--help'])\n"
        "heavy = {'torch', 'numpy', 'scipy', 'pycolmap', 'faiss', 'PIL', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_without_arguments_help_is_shown_and_the_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "reconstruct" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["recontruct"], "recontruct"),
        (["reconstruct", "--no-such-option"], "no-such-option"),
        (["reconstruct", "images"], "--output"),
        (["reconstruct", "-o", "out"], "IMAGES"),
        (["reconstruct", "a", "--image-path", "b", "-o", "out"], "IMAGES"),
        (["reconstruct", "a", "-o", "out", "--seed", "x"], "seed"),
        (["compare", "only-one"], "TRUTH"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(
    arguments: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err
    assert "--help" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no photos"), 2),
        (WeightsError("no weights"), 2),
        (ReconstructionError("no model"), 1),
        (DivergedError("NaN"), 1),
    ],
)
def test_errors_of_the_library_are_messages(
    error: Exception,
    code: int,
    two_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    replace_pipeline(monkeypatch, fail)
    arguments = ["reconstruct", str(two_photos), "-o", str(tmp_path / "out")]
    assert run(arguments) == code
    assert capsys.readouterr() == ("", f"error: {error}\n")
    assert run([*arguments, "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": str(error), "kind": type(error).__name__}
    assert err == f"error: {error}\n"
    assert not (tmp_path / "out").exists()


def test_wrong_use_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reconstruct", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "UsageError"


def test_an_interrupted_run_says_how_to_go_on(
    two_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    replace_pipeline(monkeypatch, interrupt)
    assert run(["reconstruct", str(two_photos), "-o", str(tmp_path / "out"), "--json"]) == 130
    out, err = capsys.readouterr()
    assert "the same command goes on" in err
    assert json.loads(out)["kind"] == "Interrupted"


def test_a_bug_is_visible(two_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError

    replace_pipeline(monkeypatch, crash)
    with pytest.raises(ZeroDivisionError):
        run(["reconstruct", str(two_photos), "-o", str(tmp_path / "out")])


def test_main_exits_with_the_code() -> None:
    with pytest.raises(SystemExit) as raised:
        main(["config", "show", "--set", "nonsense"])
    assert raised.value.code == 2


def test_a_plain_terminal_shows_any_name(run_command: Callable[..., Any], tmp_path: Path) -> None:
    result = run_command("compare", tmp_path / "写真", tmp_path, PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert result.code == 2
    assert "\\u5199" in result.err
