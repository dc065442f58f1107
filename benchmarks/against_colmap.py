"""The tool and COLMAP one after the other on the same photos and the same number of threads: accuracy, time, memory.

    python benchmarks/against_colmap.py [SET ...] [--threads N] [-- OPTIONS OF THE TOOL]

Each runs as a process of its own; seconds are those of the whole process, start and imports included.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

DEFAULT_SETS = ["strecha_fountain_p11", "strecha_herzjesu_p25", "nerf_fox"]
COLUMNS = {
    "AUC@1": "auc1",
    "@3": "auc3",
    "@5": "auc5",
    "RRA5": "rra5",
    "RTA5": "rta5",
    "ATE%": "ate_percent",
    "points": "points",
    "track": "track_length",
    "repr px": "reprojection_px",
    "s": "seconds",
    "MB": "peak_mb",
}


def figures_of(run: common.ChildRun, out: Path, photo_set: common.PhotoSet) -> dict[str, Any]:
    """Accuracy, seconds and memory of one finished run."""
    figures = common.score(common.read_models(out / "sparse"), photo_set)
    return figures | {
        "seconds": round(run.seconds, 2),
        "stage_seconds": common.stage_seconds(run),
        "peak_mb": round(run.peak_mb),
        "failure": common.failure(run),
    }


def measure(spec: str, threads: int, extra: Sequence[str]) -> dict[str, Any]:
    """Run both on one set."""
    with common.open_set(spec) as photo_set, tempfile.TemporaryDirectory() as folder:
        # Both find the photos in the file cache.
        for photo in photo_set.photos:
            (photo_set.images / photo).read_bytes()
        theirs_out, ours_out = Path(folder) / "colmap", Path(folder) / "ours"
        theirs = figures_of(common.run_colmap(photo_set, theirs_out, threads), theirs_out, photo_set)
        ours = figures_of(common.run_tool(photo_set.images, ours_out, threads, extra), ours_out, photo_set)
    ratios = {
        f"ratio_{name}": round(ours[name] / theirs[name], 4)
        for name in ("seconds", "peak_mb", "auc5", "registered")
        if ours.get(name) is not None and theirs.get(name)
    }
    return {"colmap": theirs, "ours": ours, **ratios}


def rows(spec: str, result: dict[str, Any]) -> list[list[object]]:
    """Two lines of the table."""
    return [
        [f"{spec} {who}", f"{result[who]['registered']}/{result[who]['photos']}"]
        + [result[who].get(name) for name in COLUMNS.values()]
        + [result["ratio_seconds"] if who == "ours" else None]
        for who in ("colmap", "ours")
    ]


def main() -> int:
    """Run the benchmark; 1 where one of the two failed on a set."""
    own, extra = common.split_arguments(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"default: {' '.join(DEFAULT_SETS)}")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(own)
    results = {}
    for spec in options.sets or DEFAULT_SETS:
        results[spec] = measure(spec, options.threads, extra)
        for who in ("colmap", "ours"):
            if results[spec][who]["failure"]:
                print(f"{spec}: {who}: {results[spec][who]['failure']}", file=sys.stderr, flush=True)
    lines = [line for spec, result in results.items() for line in rows(spec, result)]
    common.print_table(["set", "reg", *COLUMNS, "time ours/COLMAP"], lines)
    failed = [spec for spec, result in results.items() if any(result[who]["failure"] for who in ("colmap", "ours"))]
    ratios = {
        f"{name}_{spec}": value
        for spec, result in results.items()
        for name, value in result.items()
        if name.startswith("ratio_")
    }
    common.print_json(
        {"benchmark": "against_colmap", "threads": options.threads, "failed": failed, **ratios, "sets": results}
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
