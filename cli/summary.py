"""The closing summary of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mast3r_sfm.summaries import ModelSummary, RunReport

_LISTED = 20
_RESULTS = {
    "report.html": "what was done, to read in a browser",
    "points.ply": "the points, for a viewer",
    "scene.glb": "points and cameras, for a viewer",
    "transforms.json": "for nerfstudio",
    "database.db": "COLMAP's database: keypoints, matches, two-view geometries",
    "run.json": "settings, versions and figures of this run",
}


def summarise(report: RunReport, output: Path) -> str:
    """What came out, what was left out and why, how long it took, and where to look."""
    lines = [
        f"{report.num_registered} of {report.num_images} images registered in {_count(len(report.models), 'model')}"
    ]
    lines += [f"  {_model_line(model)}" for model in report.models]
    if report.left_out:
        lines.append(f"left out ({len(report.left_out)}):")
        lines += [f"  {entry.name}: {entry.reason}" for entry in report.left_out[:_LISTED]]
        if len(report.left_out) > _LISTED:
            lines.append(f"  and {len(report.left_out) - _LISTED} more: see {output / 'run.json'}")
    if weak := [image for model in report.models for image in model.per_image if image.weak]:
        listed = _some([f"{image.name} ({image.weak})" for image in weak])
        lines.append(f"held weakly, their poses may be wrong ({len(weak)}): {listed}")
    if report.rejected_pairs:
        worst = report.rejected_pairs[0]
        lines.append(
            f"{_count(len(report.rejected_pairs), 'pair')} of photos match but contradict the others, such as "
            f"{worst.first} and {worst.second}: not used, see {output / 'run.json'}"
        )
    lines += [f"note: {note}" for note in report.notes]
    times = ", ".join(f"{stage.stage} {stage.seconds:.1f}" for stage in report.stages)
    memory = max((stage.peak_memory_mb for stage in report.stages), default=0.0)
    lines.append(f"{report.seconds:.1f} s ({times}), {memory:,.0f} MB of memory at most")
    lines += [f"  {output / model.path}: COLMAP model" for model in report.models]
    lines += [f"  {output / name}: {what}" for name, what in _RESULTS.items() if (output / name).exists()]
    return "\n".join(lines)


def missing_photos(report: RunReport) -> str:
    """One line that names the photos that are in no model; empty where there are none."""
    missing = report.num_images - report.num_registered
    if missing <= 0:
        return ""
    return f"{missing} of {report.num_images} photos are not in the result: {_some([e.name for e in report.left_out])}"


def _model_line(model: ModelSummary) -> str:
    return (
        f"{model.path}: {_count(len(model.images), 'image')}, {_count(model.points, 'point')}, "
        f"mean track length {model.mean_track_length:.2f}, "
        f"mean reprojection error {model.mean_reprojection_error_px:.2f} px"
        + ("" if model.mapper == "align" else f", by COLMAP's {model.mapper} mapper")
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
