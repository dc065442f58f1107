"""`mast3r-sfm config show`, and how settings come together from a file and from the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from mast3r_sfm.config import Config

config_option = click.option(
    "--config", "config_file", metavar="FILE", type=click.Path(path_type=Path), help="Settings in TOML."
)
set_option = click.option(
    "--set",
    "assignments",
    metavar="STAGE.KEY=VALUE",
    multiple=True,
    help="Change one setting; may be given more than once. Goes over --config.",
)


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config and --set to a command."""
    return config_option(set_option(command))


def read_config(config_file: Path | None, assignments: Sequence[str]) -> Config:
    """The settings of a file, or the defaults, with assignments over them.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or has an impossible value.
    """
    config = Config() if config_file is None else Config.from_toml(config_file)
    return config.with_overrides(assignments) if assignments else config


@click.group()
def config() -> None:
    """Look at the settings."""


@config.command()
@settings_options
def show(config_file: Path | None, assignments: tuple[str, ...]) -> None:
    """Print the settings as TOML, as --config reads them."""
    click.echo(read_config(config_file, assignments).to_toml(), nl=False)
