"""`mast3r-sfm weights`: official weights, their licence, and whether they are whole."""

from __future__ import annotations

import json
import os

import click

from mast3r_sfm_cli.progress import TerminalProgress


@click.group()
def weights() -> None:
    """List, download and verify the official weights of MASt3R and DUSt3R.

    They are kept in the folder that MAST3R_SFM_WEIGHTS names, by default mast3r-sfm/weights in the user's cache folder.
    """


@weights.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_weights(as_json: bool) -> None:
    """Say which official weights there are, and which are installed."""
    from mast3r_sfm.models.weights import CATALOGUE, LICENSE, find_retrieval_files, find_weights, weights_folder

    found = {name: find_weights(name) for name in CATALOGUE}
    retrieval = {name: None if path is None else find_retrieval_files(path) for name, path in found.items()}
    if as_json:
        rows = [
            {
                "name": name,
                "about": entry.about,
                "size_bytes": entry.size_bytes,
                "license": LICENSE,
                "url": entry.url,
                "installed": None if found[name] is None else str(found[name]),
                "retrieval": None if retrieval[name] is None else str(retrieval[name]),
            }
            for name, entry in CATALOGUE.items()
        ]
        click.echo(json.dumps({"folder": str(weights_folder()), "weights": rows}))
        return
    for name, entry in CATALOGUE.items():
        click.echo(f"{name:<18}{entry.size_bytes / 1e9:.1f} GB  {LICENSE}  {entry.about}")
        click.echo(f"{'':<18}{'not installed' if found[name] is None else f'installed: {found[name]}'}")
        if retrieval[name] is not None:
            click.echo(f"{'':<18}with retrieval files: {retrieval[name]}")


@weights.command()
def where() -> None:
    """Print the folder that weights are kept in."""
    from mast3r_sfm.models.weights import FOLDER_VARIABLE, weights_folder

    click.echo(weights_folder())
    if not os.environ.get(FOLDER_VARIABLE):
        click.echo(f"set {FOLDER_VARIABLE} to keep them elsewhere", err=True)


@weights.command()
@click.argument("name")
@click.option("--accept-license", is_flag=True, help="You agree to the licence that is printed.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def download(name: str, accept_license: bool, quiet: bool) -> None:
    """Download official weights, after printing what their licence allows.

    A download that was cut off goes on where it stopped.
    """
    from mast3r_sfm.models.weights import find_weights, official_weights

    if (path := find_weights(name)) is not None:
        click.echo(f"{name} is installed already: {path}\nto check it: mast3r-sfm weights verify {name}")
        return
    click.echo(official_weights(name).license_note)
    if not accept_license:
        raise click.UsageError("to agree to this licence and download the weights, add --accept-license")

    from mast3r_sfm.models.download import download_weights

    download_weights(name, license_accepted=True, progress=TerminalProgress(quiet=quiet))
    click.echo(_verified(name))


@weights.command()
@click.argument("path")
def verify(path: str) -> None:
    """Check weights, given by their name or by a path: against the record of their download, and against their network.

    PATH may be an official .pth file, a hub folder, or a .safetensors file with its configuration beside it.
    """
    click.echo(_verified(path))


def _verified(target: str) -> str:
    from mast3r_sfm.models.weights import verify_weights

    found = verify_weights(target)
    network = found.architecture
    rows = [
        ("path", str(found.path)),
        (
            "network",
            f"head {network.head}, images of {network.image_size_px} px, "
            f"encoder {network.encoder_width} × {network.encoder_depth}, "
            f"decoder {network.decoder_width} × {network.decoder_depth}",
        ),
        ("descriptors", f"{network.descriptor_channels} channels" if network.descriptor_channels else "none"),
        ("parameters", f"{found.parameters:,}; names and shapes fit the network"),
        *(("sha256", f"{digest}  {name}") for name, digest in found.sha256.items()),
        (
            "source",
            "no record of a download: nothing to compare the sha256 with"
            if found.record is None
            else f"{found.record.repo} at {found.record.revision}: the sha256 agree with those of the download",
        ),
    ]
    return "\n".join([*(f"{name:<13}{value}" for name, value in rows), "in order"])
