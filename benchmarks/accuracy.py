"""Accuracy on real photos: the tool with no settings on photo sets, beside COLMAP's figures on the same photos.

    python benchmarks/accuracy.py [SET ...] [--out DIR] [--threads N] [-- OPTIONS OF THE TOOL]

SET is a folder of MAST3R_SFM_DATA, or name@0,3,6 for those of its photos; without one, all sets are run. In the
options of the tool, {set} stands for that folder, as in -- --intrinsics {set}/gt.json
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

COLUMNS = {
    "reg": "registered",
    "AUC@1": "auc1",
    "@3": "auc3",
    "@5": "auc5",
    "RRA5": "rra5",
    "RTA5": "rta5",
    "ATE%": "ate_percent",
    "repr px": "reprojection_px",
    "track": "track_length",
    "s": "seconds",
    "MB": "peak_mb",
    "@5*": "sampled_auc5",
    "COLMAP @5*": "colmap_auc5",
    "reg ": "colmap_registered",
}
# What a photo set may lose against COLMAP before it counts as worse.
TOLERANCE = 0.01


def measure(spec: str, out: Path, threads: int, extra: Sequence[str]) -> dict[str, Any]:
    """Run the tool on one set and give its figures by name."""
    with common.open_set(spec) as photo_set:
        folder = str(common.data_root() / spec.partition("@")[0])
        run = common.run_tool(photo_set.images, out, threads, [part.replace("{set}", folder) for part in extra])
        figures = common.score(common.read_models(out / "sparse"), photo_set)
    known = common.baseline(spec)
    figures |= {
        "seconds": round(run.seconds, 2),
        "stage_seconds": common.stage_seconds(run),
        "peak_mb": round(run.peak_mb),
        "failure": common.failure(run),
    }
    if "registered" in known:
        figures["colmap_registered"] = known["registered"]
    if "auc5" in known:
        figures["colmap_auc5"] = known["auc5"]
        figures["ratio_auc5"] = round(figures["sampled_auc5"] / known["auc5"], 4)
    return figures


def row(spec: str, figures: dict[str, Any]) -> list[object]:
    """One line of the table."""
    values = dict(figures)
    values["registered"] = f"{figures['registered']}/{figures['photos']}"
    return [
        spec,
        "+".join(map(str, figures["models"])) or "none",
        *(values.get(name) for name in COLUMNS.values()),
        len(figures["intruders"]),
    ]


def main() -> int:
    """Run the benchmark; 1 where the tool failed on a set."""
    own, extra = common.split_arguments(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET")
    parser.add_argument("--out", type=Path, help="keep the reconstructions in this folder, one per set")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(own)
    results = {}
    with tempfile.TemporaryDirectory() if options.out is None else contextlib.nullcontext(options.out) as folder:
        for spec in options.sets or common.all_sets():
            figures = results[spec] = measure(spec, Path(folder) / spec, options.threads, extra)
            done = f"{figures['registered']} of {figures['photos']} photos, {figures['seconds']} s"
            print(f"{spec}: {figures['failure'] or done}", file=sys.stderr, flush=True)
    common.print_table(
        ["set", "models", *COLUMNS, "intruders"], [row(spec, figures) for spec, figures in results.items()]
    )
    print("@5*: mean recall at 200 thresholds, the rule of colmap_baseline.json; the other AUCs by the trapezoid rule")
    failed = [spec for spec, figures in results.items() if figures["failure"]]
    ratios = [figures["ratio_auc5"] for figures in results.values() if "ratio_auc5" in figures]
    common.print_json(
        {
            "benchmark": "accuracy",
            "failed": failed,
            "below_colmap": [
                spec
                for spec, figures in results.items()
                if figures.get("sampled_auc5", 1.0) < figures.get("colmap_auc5", 0.0) - TOLERANCE
                or figures["registered"] < figures.get("colmap_registered", 0)
            ],
            "wrong_joins": sum(len(figures["intruders"]) for figures in results.values()),
            "ratio_auc5_lowest": min(ratios, default=None),
            "sets": results,
        }
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
