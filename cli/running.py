"""What commands that make models have in common: they run, show how far they are, and say what came out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mast3r_sfm.errors import ReconstructionError
from mast3r_sfm_cli.summary import missing_photos, summarise

if TYPE_CHECKING:
    from mast3r_sfm.progress import Progress
    from mast3r_sfm.summaries import RunReport


def run_and_report(work: Callable[[Progress], RunReport], output: Path, *, as_json: bool, quiet: bool) -> int:
    """Do the work, print its summary or, with `as_json`, its report, and return the exit code.

    Args:
        work: is given what it tells its progress to.
        output: its folder, which goes again where nothing was written to it.
        as_json: print run.json's content and no progress.
        quiet: warnings and errors only.
    """
    from mast3r_sfm_cli.progress import TerminalProgress

    progress = TerminalProgress(quiet=quiet or as_json)
    try:
        report = work(progress)
    finally:
        progress.finish()
        with contextlib.suppress(OSError):
            output.rmdir()  # only succeeds where nothing was written to it
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    elif not quiet:
        click.echo(summarise(report, output))
    if not report.models:
        click.echo(f"error: {report.error or 'no model could be made from these photos'}", err=True)
        return ReconstructionError.exit_code
    if missing := missing_photos(report):
        progress.warn(missing)
    return 0
