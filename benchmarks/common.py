"""What the benchmarks share: photo sets, child processes with their time and memory, scores of models, tables.

Photo sets are folders of MAST3R_SFM_DATA (by default ../shared/data): `images/` and, where it is known, `gt.json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
from PIL import Image

from mast3r_sfm.evaluation.metrics import Comparison, compare, find_intruders
from mast3r_sfm.evaluation.truth import Truth, read_truth_json
from mast3r_sfm.types import Float64

ROOT = Path(__file__).resolve().parent.parent
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")

# COLMAP's incremental mapper on sets without truth, which colmap_baseline.json leaves out.
COLMAP_REGISTERED = {"opensfm_lund": 11, "sceaux_castle": 11, "vggsfm_kitchen25": 24}
# A set of several places without truth, whose file names begin with the place.
SCENE_IN_NAME = {"phototourism_4scenes": re.compile(r"(.+?)_\d+_\d+\.\w+")}


@dataclass(frozen=True, kw_only=True)
class PhotoSet:
    """A folder of photos and what is known about them."""

    spec: str
    """Name of the set, or name@0,3,6 for those of its photos, counted in sorted order."""
    images: Path
    photos: tuple[str, ...]
    truth: Truth | None
    scene: dict[str, str]
    """Which place a photo shows, as far as it is known."""


@dataclass(frozen=True, kw_only=True)
class ChildRun:
    """A finished process."""

    seconds: float
    """Wall clock of the whole process, start and imports included."""
    peak_mb: float
    """Largest resident memory of the process or of one of its children."""
    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True, kw_only=True)
class Model:
    """One COLMAP model."""

    poses: dict[str, Float64]
    points: int
    track_length: float
    reprojection_px: float


def data_root() -> Path:
    """The folder of the photo sets."""
    folder = Path(os.environ.get("MAST3R_SFM_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        sys.exit(f"no folder {folder}: set MAST3R_SFM_DATA to a folder of photo sets")
    return folder


def all_sets() -> list[str]:
    """Names of all photo sets."""
    return sorted(folder.parent.name for folder in data_root().glob("*/images"))


@contextmanager
def open_set(spec: str) -> Iterator[PhotoSet]:
    """Give a photo set; of a part of one, its photos are copied into a folder that goes away afterwards."""
    name, _, indices = spec.partition("@")
    folder = data_root() / name
    if not (folder / "images").is_dir():
        sys.exit(f"there is no photo set {name} in {data_root()}; there are {', '.join(all_sets())}")
    photos = sorted(path.name for path in (folder / "images").iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
    truth = read_truth_json(folder / "gt.json") if (folder / "gt.json").is_file() else None
    with tempfile.TemporaryDirectory() as scratch:
        images = folder / "images"
        if indices:
            photos = [photos[int(index)] for index in indices.split(",")]
            images = Path(scratch)
            for photo in photos:
                shutil.copy2(folder / "images" / photo, images / photo)
            truth = truth and truth.restricted_to(photos)
        yield PhotoSet(spec=spec, images=images, photos=tuple(photos), truth=truth, scene=_scenes(name, photos, truth))


def _scenes(name: str, photos: Sequence[str], truth: Truth | None) -> dict[str, str]:
    if truth is not None:
        return dict(truth.scene)
    pattern = SCENE_IN_NAME.get(name)
    matches = {photo: pattern.fullmatch(photo) for photo in photos} if pattern else {}
    return {photo: match[1] for photo, match in matches.items() if match}


def run_child(command: Sequence[str | Path]) -> ChildRun:
    """Run a command to its end.

    The memory is the kernel's own count. It cannot be less than what this process held when it started the child, some
    100 MB.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=err, cwd=ROOT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        return ChildRun(
            seconds=seconds,
            peak_mb=usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
            code=process.returncode,
            stdout=out.read().decode(errors="replace"),
            stderr=err.read().decode(errors="replace"),
        )


def run_tool(images: Path, out: Path, threads: int, extra: Sequence[str] = ()) -> ChildRun:
    """`mast3r-sfm reconstruct IMAGES -o OUT` as a process of its own."""
    tool: list[str | Path] = [sys.executable, "-m", "mast3r_sfm_cli.main", "reconstruct", images, "-o", out]
    return run_child([*tool, "--json", "--threads", str(threads), *extra])


def run_colmap(photo_set: PhotoSet, out: Path, threads: int) -> ChildRun:
    """COLMAP's SIFT, exhaustive matching and incremental mapper as a process of its own.

    All photos share one camera where they have one size; otherwise COLMAP could not take them.
    """
    sizes = set()
    for photo in photo_set.photos:
        with Image.open(photo_set.images / photo) as image:
            sizes.add(image.size)
    script = Path(__file__).parent / "colmap_reference.py"
    shared = ["--one-camera"] if len(sizes) == 1 else []
    return run_child([sys.executable, script, photo_set.images, out, "--threads", str(threads), *shared])


def stage_seconds(run: ChildRun) -> dict[str, float]:
    """Seconds of each stage, from the report that the tool prints; empty where it printed none."""
    return {stage["stage"]: round(stage["seconds"], 2) for stage in _report(run).get("stages", [])}


def stage_counts(run: ChildRun) -> dict[str, dict[str, float]]:
    """What each stage counted, from the report that the tool prints; empty where it printed none."""
    return {stage["stage"]: stage["counts"] for stage in _report(run).get("stages", [])}


def failure(run: ChildRun) -> str:
    """Why a process did not do its work, in its own last words; empty where it did.

    The tool ends with 1 and a report where the photos carry no model: that is a result. A crash ends with 1 as well.
    """
    if run.code == 0 or (run.code == 1 and _report(run)):
        return ""
    last = run.stderr.strip().splitlines()[-1:] or ["it said nothing"]
    return f"exit code {run.code}: {last[0]}"


def _report(run: ChildRun) -> dict[str, Any]:
    try:
        report = json.loads(run.stdout)
    except json.JSONDecodeError:
        return {}
    return report if isinstance(report, dict) else {}


def read_models(sparse: Path) -> list[Model]:
    """The models below a folder such as OUT/sparse, largest first; empty where there is none."""
    found = []
    for folder in sparse.glob("*/"):
        if not any((folder / name).is_file() for name in ("images.bin", "images.txt")):
            continue
        model = pycolmap.Reconstruction(str(folder))
        poses = {image.name: image.cam_from_world().matrix() for image in model.images.values() if image.has_pose}
        found.append(
            Model(
                poses=poses,
                points=model.num_points3D(),
                track_length=model.compute_mean_track_length(),
                reprojection_px=model.compute_mean_reprojection_error(),
            )
        )
    return sorted(found, key=lambda model: (-len(model.poses), min(model.poses, default="")))


def sampled_auc(errors_deg: Float64, threshold_deg: float) -> float:
    """Mean recall at 200 evenly spaced thresholds up to `threshold_deg`: how colmap_baseline.json was measured.

    It is 0.0025 above the exact area for a curve that rises to 1, and up to 0.02 apart from the field's trapezoid rule
    on sets of a few pairs; figures are compared with the baseline by this rule only.
    """
    thresholds = np.linspace(0.0, threshold_deg, 201)[1:]
    return float((errors_deg[:, None] <= thresholds).mean())


def score(models: Sequence[Model], photo_set: PhotoSet) -> dict[str, Any]:
    """Figures of a result by name; those that need a truth are absent without one."""
    names = [list(model.poses) for model in models]
    unrelated = photo_set.truth.unrelated if photo_set.truth else ()
    figures: dict[str, Any] = {
        "photos": len(photo_set.photos),
        "registered": len(names[0]) if names else 0,
        "registered_any": len({name for model in names for name in model}),
        "models": [len(model) for model in names],
        "points": models[0].points if models else 0,
        "track_length": round(models[0].track_length, 2) if models else None,
        "reprojection_px": round(models[0].reprojection_px, 3) if models else None,
        "intruders": list(find_intruders(names, photo_set.scene, unrelated)),
    }
    if photo_set.truth is not None:
        figures |= _accuracy(compare([model.poses for model in models], photo_set.truth))
    return figures


def _accuracy(comparison: Comparison) -> dict[str, Any]:
    errors = comparison.pairs.error_deg
    accuracy = {f"auc{threshold}": round(area, 4) for threshold, area in comparison.auc.items()}
    accuracy |= {f"sampled_auc{threshold}": round(sampled_auc(errors, threshold), 4) for threshold in (1, 3, 5)}
    translation = comparison.translation_accuracy
    return accuracy | {
        "rra5": round(comparison.rotation_accuracy[5], 4),
        "rta5": round(translation[5], 4) if translation else None,
        "median_rotation_deg": round(comparison.median_rotation_deg, 4),
        "ate_percent": None if comparison.ate_of_size is None else round(100 * comparison.ate_of_size, 4),
    }


def baseline(spec: str) -> dict[str, float]:
    """COLMAP's best figures for a set from colmap_baseline.json: `registered` and, where known, `auc5`; or empty."""
    path = data_root() / "colmap_baseline.json"
    known = json.loads(path.read_text(encoding="utf-8"))["sets"] if path.is_file() else {}
    if spec in known:
        best = max(known[spec].values(), key=lambda figures: float(figures["auc5"]))
        return {"registered": best["reg"], "auc5": best["auc5"]}
    return {"registered": COLMAP_REGISTERED[spec]} if spec in COLMAP_REGISTERED else {}


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns that line up: the first to the left, the others to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]), flush=True)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_json(values: dict[str, Any]) -> None:
    """The last line of every benchmark."""
    print(json.dumps(values, allow_nan=False), flush=True)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of the benchmark, and those after `--`, which go to the tool as they are."""
    own = list(arguments)
    if "--" not in own:
        return own, []
    at = own.index("--")
    return own[:at], own[at + 1 :]
