"""What the user knows of cameras and poses: the options that commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

_OPTIONS = [
    click.option(
        "--intrinsics",
        metavar="FILE",
        help="Known cameras, which stay as they are: a gt.json, a transforms.json, a COLMAP model, or its cameras.txt "
        "or cameras.bin alone.",
    ),
    click.option("--intrinsics-prior", is_flag=True, help="Refine what --intrinsics says."),
    click.option("--poses", metavar="FILE", help="Known poses, which stay as they are: a gt.json or a COLMAP model."),
    click.option(
        "--poses-prior", is_flag=True, help="Refine all poses; the model is brought to where --poses has them."
    ),
]
cameras_option = click.option(
    "--cameras",
    metavar="NAME",
    help="Photos that share a camera: of one size and EXIF camera (auto), of one size (single), of one folder "
    "(folder), none (image).  [default: auto]",
)


def known_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options about what is known to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def known_assignments(flags: Mapping[str, Any]) -> list[str]:
    """The settings that the options about what is known stand for."""
    found = []
    for name in ("intrinsics", "poses"):
        if flags[name] is not None:
            found.append(f"known.{name}={flags[name]}")
        if flags[f"{name}_prior"]:
            found.append(f"known.{name}_mode=prior")
    return found
