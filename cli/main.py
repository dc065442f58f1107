"""The entry point: the commands, and how their ends become exit codes and messages.

0: done, with all photos or a part of them; 1: everything ran, but there is no model; 2: wrong use, settings or files;
130: interrupted. Library modules are imported inside the commands, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import gc
import io
import json
import os
import sys
from collections.abc import Sequence

import click

from mast3r_sfm import __version__
from mast3r_sfm.errors import Mast3rSfmError
from mast3r_sfm_cli.align import align
from mast3r_sfm_cli.compare import compare
from mast3r_sfm_cli.config import config
from mast3r_sfm_cli.doctor import doctor
from mast3r_sfm_cli.existing import register, triangulate
from mast3r_sfm_cli.pairs import pairs
from mast3r_sfm_cli.reconstruct import reconstruct
from mast3r_sfm_cli.weights import weights

_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mast3r-sfm")
def cli() -> None:
    """Structure from motion: a folder of photos becomes a COLMAP model."""


for _command in (reconstruct, triangulate, register, pairs, align, compare, doctor, config, weights):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    # torch's threads else wait for each other by spinning, and where another thread or process wants their core, that
    # makes small products 10 to 30 times slower. Read when torch is loaded; on an idle machine it costs 5 %.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Loading torch makes many objects and no garbage: looking for it at Python's own pace takes a tenth of a second.
    gc.set_threshold(50_000)
    code = run(sys.argv[1:] if arguments is None else arguments)
    # Python's end looks for garbage among all that torch ever made, which takes half a second and frees nothing.
    gc.freeze()
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code. What is a bug, and not an error of ours, is raised."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no name of a photo may end a run on a plain terminal
    try:
        code = cli.main(args=list(arguments), prog_name="mast3r-sfm", standalone_mode=False)
    except Mast3rSfmError as error:
        _report(arguments, str(error), type(error).__name__)
        return error.exit_code
    except click.ClickException as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()
        else:
            context = error.ctx if isinstance(error, click.UsageError) else None
            hint = "" if context is None else f"; see {context.command_path} --help"
            _report(arguments, error.format_message().rstrip(".") + hint, "UsageError")
        return error.exit_code
    except click.Abort:
        _report(arguments, "interrupted; the same command goes on where it stopped", "Interrupted")
        return _INTERRUPTED
    return code if isinstance(code, int) else 0


def _report(arguments: Sequence[str], message: str, kind: str) -> None:
    if "--json" in arguments:
        click.echo(json.dumps({"error": message, "kind": kind}))
    click.echo(f"error: {message}", err=True)


if __name__ == "__main__":
    main()
