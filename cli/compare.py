"""`mast3r-sfm compare`: a reconstruction against the truth, or against another reconstruction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mast3r_sfm.errors import InputError, some_of

if TYPE_CHECKING:
    from mast3r_sfm.evaluation.metrics import Comparison
    from mast3r_sfm.evaluation.truth import Truth
    from mast3r_sfm.types import Float64


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("truth", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(model: Path, truth: Path, as_json: bool) -> None:
    """Measure the camera poses of MODEL against TRUTH.

    MODEL is a COLMAP model, a folder with several of them, or the output of `reconstruct`. TRUTH is another one, or a
    JSON file of poses. The frames and scales of both are free.
    """
    from mast3r_sfm.evaluation import metrics

    comparison = metrics.compare(read_poses(model), read_truth(truth))
    click.echo(json.dumps(comparison.to_dict()) if as_json else describe(comparison))


def find_models(path: Path) -> list[Path]:
    """The COLMAP models at or below `path`, in the order of their numbers; none for a run that ended without one.

    Raises:
        InputError: there is no such folder, or it holds no model.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder" if path.exists() else f"the folder {path} does not exist")
    for folder in (path, path / "sparse"):
        if _is_model(folder):
            return [folder]
        numbered = [entry for entry in folder.glob("*") if entry.name.isdecimal() and _is_model(entry)]
        if numbered:
            return sorted(numbered, key=lambda entry: int(entry.name))
    if (path / "run.json").exists():
        return []
    raise InputError(f"no COLMAP model in {path}: looked for images.bin or images.txt there, in 0, 1, … and in sparse/")


def read_poses(path: Path) -> list[dict[str, Float64]]:
    """cam_from_world [3, 4] by image name, for each model at `path`."""
    from mast3r_sfm.colmap.model import read_model

    return [read_model(folder).cam_from_world for folder in find_models(path)]


def read_truth(path: Path) -> Truth:
    """A truth from a JSON file, or from COLMAP models, each of which is a scene of its own."""
    from mast3r_sfm.evaluation.truth import Truth, read_truth_json

    if not path.is_dir():
        return read_truth_json(path)
    poses: dict[str, Float64] = {}
    scene: dict[str, str] = {}
    for index, model in enumerate(read_poses(path)):
        for name in model.keys() - poses.keys():
            poses[name], scene[name] = model[name], str(index)
    return Truth(cam_from_world=poses, scene=scene)


def describe(comparison: Comparison) -> str:
    """The comparison as a table for a person."""
    auc = "  ".join(f"@{limit}° {100 * value:.1f}" for limit, value in comparison.auc.items())
    in_models = f" in {comparison.models} models, {comparison.registered_in_largest} in the largest"
    rows = [
        (
            "registered",
            f"{comparison.registered} of {comparison.images}" + (in_models if comparison.models > 1 else ""),
        ),
        (
            "pairs",
            f"{int(comparison.pairs.is_measured.sum())} of {len(comparison.pairs)} have both images in one model",
        ),
        ("AUC", f"{auc}  (%)"),
        ("RRA", _shares(comparison.rotation_accuracy)),
        ("RTA", _shares(comparison.translation_accuracy)),
        ("median error", _medians(comparison)),
    ]
    for scene in comparison.scenes:
        label = f"ATE {scene.scene}".strip()
        if scene.trajectory is None:
            rows.append((label, "not measured: fewer than three images, or all true centres coincide"))
        else:
            figures = scene.trajectory
            share = f"{100 * figures.rmse_of_size:.3f} % of the scene size {figures.scene_size:.3g}"
            rows.append((label, f"{figures.rmse:.4g}, {share}, over {figures.images} images"))
    for what, names in (
        ("missing", comparison.missing),
        ("wrong model", comparison.intruders),
        ("not in truth", comparison.unknown),
    ):
        if names:
            rows.append((what, some_of(names)))
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:<{width}}{value}" for label, value in rows)


def _is_model(folder: Path) -> bool:
    return any((folder / f"images.{kind}").is_file() for kind in ("bin", "txt"))


def _shares(shares: Mapping[int, float] | None) -> str:
    if shares is None:
        return "no pair has a baseline"
    return "  ".join(f"@{limit}° {100 * value:.1f}" for limit, value in shares.items()) + "  (%)"


def _medians(comparison: Comparison) -> str:
    rotation = f"rotation {comparison.median_rotation_deg:.3f}°"
    if comparison.median_translation_deg is None:
        return rotation
    return f"{rotation}, direction of translation {comparison.median_translation_deg:.3f}°"
