"""Where photos come from and results go: the arguments, and what is checked before any work is done."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mast3r_sfm.errors import ArtifactError, ConfigError

_STAGES = frozenset(("prepare", "encode", "pairs", "sift", "match", "align", "map", "export"))

_ARGUMENTS = [
    click.argument("images", required=False, type=click.Path(path_type=Path)),
    click.option("--image-path", metavar="IMAGES", type=click.Path(path_type=Path), help="The same as IMAGES."),
    click.option(
        "--mask-path",
        metavar="DIR",
        help="Masks of the photos, as COLMAP has them: DIR/a/b.jpg.png for a/b.jpg; 0 = ignore.",
    ),
    click.option(
        "-o",
        "--output",
        "--output-path",
        metavar="OUT",
        required=True,
        type=click.Path(path_type=Path),
        help="New folder.",
    ),
]


def image_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add IMAGES, --image-path, --mask-path and --output to a command."""
    for argument in reversed(_ARGUMENTS):
        command = argument(command)
    return command


def image_folder(images: Path | None, image_path: Path | None) -> Path:
    """IMAGES, or --image-path as COLMAP calls it.

    Raises:
        click.UsageError: neither or both are given.
    """
    if (images is None) == (image_path is None):
        command = click.get_current_context().command_path
        raise click.UsageError(f"name the folder with the photos: {command} IMAGES -o OUT")
    return images or image_path or Path()


def check_output(images: Path, output: Path, *, overwrite: bool) -> None:
    """Make the output folder, or find out why it cannot be used, before any work is done.

    Raises:
        ConfigError: it is a file, it lies inside the folder with the photos, or it holds files of somebody else.
        ArtifactError: it cannot be written.
    """
    if output.resolve().is_relative_to(images.resolve()):
        raise ConfigError(f"the output {output} lies inside the photos' folder {images}; choose a folder outside of it")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output {output} is a file; choose a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        strange = not overwrite and not _is_ours(output) and any(output.iterdir())
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ArtifactError(f"cannot write to {output}: {error.strerror}; choose another folder") from error
    if strange:
        raise ConfigError(
            f"the output {output} holds files that are not from an earlier run; choose another folder, "
            "or add --overwrite to write beside them"
        )


def _is_ours(output: Path) -> bool:
    cache = output / "cache"
    if cache.is_dir() and {entry.name for entry in cache.iterdir()} <= _STAGES:
        return True
    try:
        return "stages" in json.loads((output / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
