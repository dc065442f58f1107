"""`mast3r-sfm triangulate` and `mast3r-sfm register`: photos against a model that there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mast3r_sfm.config import Config, RunOptions
from mast3r_sfm_cli.config import read_config, settings_options
from mast3r_sfm_cli.folders import check_output
from mast3r_sfm_cli.known import cameras_option
from mast3r_sfm_cli.pairs import pairs_assignments, pairs_options
from mast3r_sfm_cli.running import run_and_report

if TYPE_CHECKING:
    from mast3r_sfm.progress import Progress
    from mast3r_sfm.summaries import RunReport

_OPTIONS: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
    click.argument("images", type=click.Path(path_type=Path)),
    click.argument("model_path", metavar="MODEL", type=click.Path(path_type=Path)),
    click.option("-o", "--output", metavar="OUT", required=True, type=click.Path(path_type=Path), help="New folder."),
    click.option("--model", metavar="NAME", help="The network, as for reconstruct.  [default: auto]"),
    settings_options,
    pairs_options,
    click.option("--features", metavar="NAME", help="What is matched, as for reconstruct.  [default: auto]"),
    click.option("--seed", type=int, help="The same seed gives the same result.  [default: 0]"),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps."),
    click.option("--threads", default=0, help="CPU threads.  [default: all]"),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object, the content of run.json, on stdout."),
    click.option("--quiet", is_flag=True, help="No progress and no summary; warnings and errors only."),
    click.option("--resume/--no-resume", default=True, help="Go on where an earlier run stopped.  [default: yes]"),
    click.option("--overwrite", is_flag=True, help="Write to OUT even where it holds other files."),
]


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@_options
def triangulate(**flags: Any) -> int:
    """Match the photos of MODEL in the folder IMAGES, and triangulate points from its poses and cameras.

    MODEL is a COLMAP model or a gt.json with poses and intrinsics, all of which stay as they are.
    """
    from mast3r_sfm.existing import triangulate as run

    return _run(flags, lambda config, options, progress: run(*_places(flags), config, options, progress))


@click.command()
@_options
@cameras_option
@click.option("--refine-poses", is_flag=True, help="Refine the poses of MODEL, too; the frame stays.")
def register(**flags: Any) -> int:
    """Add the photos in the folder IMAGES that MODEL does not hold to it.

    IMAGES holds the photos of MODEL as well, whose cameras and poses stay as they are. OUT gets the whole model.
    """
    from mast3r_sfm.existing import register as run

    return _run(
        flags,
        lambda config, options, progress: run(*_places(flags), config, options, progress, refine=flags["refine_poses"]),
    )


def _places(flags: Mapping[str, Any]) -> tuple[Path, Path, Path]:
    return flags["images"], flags["model_path"], flags["output"]


def _run(flags: Mapping[str, Any], work: Callable[[Config, RunOptions, Progress], RunReport]) -> int:
    own = {
        "encode.model": flags["model"],
        "seed": flags["seed"],
        "match.features": flags["features"],
        "prepare.cameras": flags.get("cameras"),
    }
    given = [f"{name}={value}" for name, value in own.items() if value is not None]
    config = read_config(flags["config_file"], [*flags["assignments"], *given, *pairs_assignments(flags)])
    output: Path = flags["output"]
    check_output(flags["images"], output, overwrite=flags["overwrite"])
    options = RunOptions(device=flags["device"], threads=flags["threads"], resume=flags["resume"])
    return run_and_report(
        lambda progress: work(config, options, progress), output, as_json=flags["as_json"], quiet=flags["quiet"]
    )
