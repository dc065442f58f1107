"""`mast3r-sfm pairs`: which pairs of photos are worth matching; and the options about pairs that commands share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mast3r_sfm.config import RunOptions
from mast3r_sfm_cli.config import read_config, settings_options
from mast3r_sfm_cli.folders import check_output, image_folder, image_options
from mast3r_sfm_cli.known import known_assignments, known_options

if TYPE_CHECKING:
    from mast3r_sfm.summaries import PairsReport

_SETTINGS = {
    "pairs_source": "pairs.source",
    "pairs_file": "pairs.file",
    "keyframes": "pairs.keyframes",
    "neighbours": "pairs.neighbours",
    "window": "pairs.window",
}
_OPTIONS = [
    click.option(
        "--pairs",
        "pairs_source",
        metavar="SOURCES",
        help="retrieval, exhaustive, sequential, swin, gps, file, or several, as retrieval,sequential.  [default: fits "
        "the number of photos]",
    ),
    click.option(
        "--pairs-file", metavar="FILE", help="Two names in each line; without --pairs, only these pairs are matched."
    ),
    click.option("--keyframes", type=int, help="Photos spread over the collection, all of whose pairs are matched."),
    click.option("--neighbours", type=int, help="Similar photos (gps: near ones) to match each photo with."),
    click.option("--window", type=int, help="Next photos to match each photo with (sequential, swin)."),
]


def pairs_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options about pairs to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def pairs_assignments(flags: Mapping[str, Any]) -> list[str]:
    """The settings that the options about pairs stand for."""
    found = [f"{setting}={flags[name]}" for name, setting in _SETTINGS.items() if flags[name] is not None]
    only_file = flags["pairs_file"] is not None and flags["pairs_source"] is None
    return [*found, *(["pairs.source=file"] if only_file else [])]


@click.command()
@image_options
@click.option("--model", metavar="NAME", help="As for reconstruct.  [default: auto]")
@settings_options
@pairs_options
@known_options
@click.option("--seed", type=int, help="The same seed gives the same result.  [default: 0]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@click.option("--threads", default=0, help="CPU threads.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--quiet", is_flag=True, help="No progress and no summary; warnings and errors only.")
@click.option("--resume/--no-resume", default=True, help="Take up what an earlier run left in OUT.  [default: yes]")
@click.option("--overwrite", is_flag=True, help="Write to OUT even where it holds other files.")
def pairs(**flags: Any) -> int:
    """Decide which pairs of the photos in the folder IMAGES are worth matching.

    OUT/pairs.txt lists them, two names in each line, as COLMAP and --pairs-file take them; OUT/pairs.png shows
    how similar the photos are and the graph of the pairs. `reconstruct` with the same OUT goes on from there.
    """
    return _run(flags)


def _run(flags: Mapping[str, Any]) -> int:
    images, output = image_folder(flags["images"], flags["image_path"]), flags["output"]
    config = read_config(flags["config_file"], _assignments(flags))
    check_output(images, output, overwrite=flags["overwrite"])

    from mast3r_sfm.pipeline import choose_pairs
    from mast3r_sfm_cli.progress import TerminalProgress

    progress = TerminalProgress(quiet=flags["quiet"] or flags["as_json"])
    options = RunOptions(device=flags["device"], threads=flags["threads"], resume=flags["resume"])
    try:
        report = choose_pairs(images, output, config, options, progress)
    finally:
        progress.finish()
    if flags["as_json"]:
        click.echo(json.dumps(dataclasses.asdict(report)))
    elif not flags["quiet"]:
        click.echo(_summary(report, output))
    return 0


def _assignments(flags: Mapping[str, Any]) -> Sequence[str]:
    own = {"encode.model": flags["model"], "seed": flags["seed"], "prepare.mask_path": flags["mask_path"]}
    given = [f"{name}={value}" for name, value in own.items() if value is not None]
    return [*flags["assignments"], *given, *pairs_assignments(flags), *known_assignments(flags)]


def _summary(report: PairsReport, output: Path) -> str:
    every = report.num_images * (report.num_images - 1) // 2
    seconds = sum(stage.seconds for stage in report.stages)
    return "\n".join(
        [
            f"{report.pairs:,} of {every:,} pairs of {report.num_images:,} photos, in {seconds:.1f} s",
            *(f"note: {note}" for note in report.notes),
            f"  {output / 'pairs.txt'}: the pairs",
            f"  {output / 'pairs.png'}: how similar the photos are, and the graph of the pairs",
        ]
    )
