"""What a person at a terminal sees of a run: a bar for each stage, and lines for what they should know."""

from __future__ import annotations

import os
import sys

import click
from tqdm import tqdm

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


class TerminalProgress:
    """Implements `mast3r_sfm.progress.Progress` on stderr.

    Bars and notes are for terminals only. Warnings are always written, one line each.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """Write to stderr; `quiet` leaves warnings only, on a terminal too."""
        self._lively = sys.stderr.isatty() and not quiet
        self._bar: tqdm[None] | None = None

    def start(self, stage: str, total: int, unit: str) -> None:
        """Show the bar of a stage, with the time that is left where the number of steps is known."""
        if self._lively:
            self.finish()
            columns, rows = _terminal_size()
            self._bar = tqdm(
                total=total or None,
                desc=f"{stage:<8}",
                unit=f" {unit}",
                file=sys.stderr,
                ncols=columns,
                nrows=rows,
                bar_format=_BAR,
            )

    def advance(self, steps: int = 1) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(steps)

    def finish(self) -> None:
        """Leave the bar as it is, with the time the stage took."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def note(self, message: str) -> None:
        """Write a line on a terminal; elsewhere the closing summary has it."""
        if self._lively:
            self._write(message)

    def warn(self, message: str) -> None:
        """Write a line."""
        self._write(f"warning: {message}")

    def _write(self, line: str) -> None:
        if self._bar is None:
            click.echo(line, err=True)
        else:
            self._bar.write(line, file=sys.stderr)


def _terminal_size() -> tuple[int, int]:
    # Containers and serial lines often give a terminal the size 0×0; tqdm would then show empty bars.
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        return 80, 24
    return size.columns or 80, size.lines or 24
