"""`mast3r-sfm align`: a finished model brought to GPS or to known camera positions."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mast3r_sfm.config import ExportConfig, ModelFormat
from mast3r_sfm.errors import ConfigError, InputError
from mast3r_sfm_cli.compare import find_models, read_truth
from mast3r_sfm_cli.config import read_config

if TYPE_CHECKING:
    from mast3r_sfm.geometry.geodesy import LocalFrame
    from mast3r_sfm.georegistration import Placement, Reference

_LISTED = 10
_REPORT = "align.json"
_FILES = {_REPORT} | {
    f"{name}.{kind}" for name in ("cameras", "images", "points3D", "rigs", "frames") for kind in ("bin", "txt")
}


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--image-path",
    metavar="IMAGES",
    type=click.Path(path_type=Path),
    help="Folder of the model's photos: to the GPS positions in their EXIF data.",
)
@click.option(
    "--positions",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="To known positions: lines of a name and x y z, a JSON file of poses (gt.json), or a COLMAP model.",
)
@click.option("--format", "file_format", metavar="NAME", help="binary, text or colmap-3.8.  [default: binary]")
@click.option("--seed", default=0, help="The same seed gives the same result.  [default: 0]")
@click.option("--overwrite", is_flag=True, help="Replace a model that stands in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, the content of OUT/align.json.")
def align(**flags: Any) -> None:
    """Bring MODEL to the positions that its cameras are known to have had, and write it to the folder OUT.

    With --image-path, the model's units become metres, and its axes point to the east, to the north and up. Up to half
    of the positions may be wrong. OUT/align.json holds the origin, the similarity and the errors.
    """
    model_path, out = flags["model"], flags["out"]
    photos, positions = flags["image_path"], flags["positions"]
    if (photos is None) == (positions is None):
        raise click.UsageError("say what to align to: --image-path with the photos, or --positions with a file")
    file_format = _format(flags["file_format"])
    _check_out(out, overwrite=flags["overwrite"])

    from mast3r_sfm.colmap.model import SPACES_IN_TEXT, read_model
    from mast3r_sfm.georegistration import gps_reference, place
    from mast3r_sfm.storage.cache import write_json

    model = read_model(_only_model(model_path))
    names = tuple(model.cam_from_world)
    reference = gps_reference(names, photos) if positions is None else _read_positions(positions, names)
    placement = place(model, reference, flags["seed"])
    model.transformed(placement.similarity).write(out, file_format)
    if file_format == "text" and any(" " in name for name in names):
        click.echo(f"warning: {SPACES_IN_TEXT}", err=True)
    report = _report(placement, reference, len(names))
    write_json(out / _REPORT, report)
    click.echo(json.dumps(report) if flags["as_json"] else _describe(placement, reference, out))


def _format(name: str | None) -> ModelFormat:
    return read_config(None, [f"export.format={name}"]).export.format if name else ExportConfig().format


def _check_out(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"the output {out} is a file; choose a folder")
    present = {entry.name for entry in out.iterdir()}
    if present - _FILES:
        raise ConfigError(
            f"the output {out} holds other things than a model, such as {min(present - _FILES)}; choose a new folder"
        )
    if present and not overwrite:
        raise ConfigError(f"there is a model in {out}; choose a new folder, or add --overwrite to replace it")


def _only_model(path: Path) -> Path:
    models = find_models(path)
    if len(models) != 1:
        found = ", ".join(map(str, models)) or "none"
        raise InputError(f"{path} holds {len(models)} models ({found}); name the folder of one of them")
    return models[0]


def _read_positions(path: Path, names: tuple[str, ...]) -> Reference:
    """Known positions: of the scene that shares most images with the model, where a file holds several."""
    from mast3r_sfm.geometry.rigid import camera_centre
    from mast3r_sfm.georegistration import Reference, read_position_list

    if not path.is_dir() and path.suffix.lower() != ".json":
        return Reference(positions=read_position_list(path))
    truth = read_truth(path)
    scenes = truth.names_by_scene.values()
    shared = max(scenes, key=lambda scene: len(set(scene) & set(names)))
    return Reference(positions={name: camera_centre(truth.cam_from_world[name]) for name in shared})


def _report(placement: Placement, reference: Reference, num_images: int) -> dict[str, Any]:
    similarity, frame = placement.similarity, reference.frame
    return {
        "images": num_images,
        "compared": len(placement.names),
        "agreeing": len(placement.names) - len(placement.disagreeing),
        "unit": "m" if frame else "",
        "median_error": placement.median_error,
        "max_error_of_agreeing": placement.max_error_of_agreeing,
        "max_error": float(placement.distances.max()),
        "errors": dict(zip(placement.names, placement.distances.tolist(), strict=True)),
        "disagreeing": list(placement.disagreeing),
        "tilt_deg": placement.tilt_deg if math.isfinite(placement.tilt_deg) else None,
        "levelled_by_cameras": placement.is_levelled,
        "scale": similarity.scale,
        "rotation": similarity.rotation.tolist(),
        "translation": similarity.translation.tolist(),
        "origin": None if frame is None else {**dataclasses.asdict(frame), "axes": "east, north, up"},
        "notes": list(reference.notes),
    }


def _describe(placement: Placement, reference: Reference, out: Path) -> str:
    frame, wrong, count = reference.frame, placement.disagreeing, len(placement.names)
    lines = [
        f"{count - len(wrong)} of {count} known positions agree with the model",
        f"  median error {_length(placement.median_error, frame)} over all; of those that agree at most "
        f"{_length(placement.max_error_of_agreeing, frame)}",
    ]
    if wrong:
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        worst = [f"{name} by {_length(distance, frame)}" for name, distance in list(wrong.items())[:_LISTED]]
        lines.append("  off: " + ", ".join(worst) + more)
    lines += [f"note: {note}" for note in reference.notes]
    if placement.is_levelled:
        lines.append("note: the positions lie nearly on one line; which way is up was taken from how the cameras stand")
    if frame:
        lines.append(
            f"metres to the east, north and up of {frame.latitude_deg:.7f}°, {frame.longitude_deg:.7f}°, "
            f"{frame.altitude_m:.1f} m"
        )
    lines += [f"  {out}: COLMAP model", f"  {out / _REPORT}: similarity, origin and errors"]
    return "\n".join(lines)


def _length(value: float, frame: LocalFrame | None) -> str:
    return f"{value:.3f} m" if frame else f"{value:.4g}"
