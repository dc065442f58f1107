"""What a person sees while it runs: bars at a terminal, warnings everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from mast3r_sfm_cli.progress import TerminalProgress


def run_a_stage(progress: TerminalProgress) -> None:
    progress.start("encode", 4, "image")
    progress.advance()
    progress.note("a note")
    progress.warn("a warning")
    progress.advance(3)
    progress.finish()
    progress.finish()
    progress.start("map", 0, "step")
    progress.advance()
    progress.finish()


@pytest.fixture
def as_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes what stderr is at the time of the call pass for a terminal."""
    return lambda: monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_a_terminal_sees_stages_steps_notes_and_warnings(
    as_terminal: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    as_terminal()
    run_a_stage(TerminalProgress())
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("encode", "4/4", "image", "a note\n", "warning: a warning\n", "map"):
        assert part in err


def test_quiet_on_a_terminal(as_terminal: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    as_terminal()
    run_a_stage(TerminalProgress(quiet=True))
    assert capsys.readouterr() == ("", "warning: a warning\n")


def test_a_log_file_sees_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    run_a_stage(TerminalProgress())
    assert capsys.readouterr() == ("", "warning: a warning\n")


def test_a_stage_that_was_not_finished_is_closed_by_the_next(
    as_terminal: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    as_terminal()
    progress = TerminalProgress()
    progress.start("encode", 4, "image")
    progress.start("match", 2, "pair")
    progress.advance(2)
    progress.finish()
    assert "2/2" in capsys.readouterr().err


def test_a_real_terminal_without_a_size_sees_bars() -> None:
    program = (
        "from mast3r_sfm_cli.progress import TerminalProgress\n"
        "progress = TerminalProgress()\n"
        "progress.start('encode', 4, 'image')\n"
        "progress.advance(4)\n"
        "progress.finish()\n"
    )
    master, slave = os.openpty()
    try:
        subprocess.run([sys.executable, "-c", program], stderr=slave, check=True)
        shown = os.read(master, 10_000).decode()
    finally:
        os.close(slave)
        os.close(master)
    assert "encode" in shown
    assert "4/4" in shown
    assert "100%" in shown
