"""The pairs that retrieval chooses against all pairs: how many are matched, and do the poses lose anything?

    python benchmarks/pairs.py [SET ...] [--threads N] [-- OPTIONS OF THE TOOL]

Three runs per set (default: three sets): all pairs; the pairs of the default settings; and those that retrieval chooses
with a fifth of the photos as neighbours, two fifths of all pairs at most. What stands after -- goes to all of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

SETS = ["strecha_herzjesu_p25", "nerf_fox", "kitti_odo_seq1"]


def choices(photos: int) -> dict[str, list[str]]:
    """Options of the tool by the name of the choice."""
    return {
        "exhaustive": ["--pairs", "exhaustive"],
        "default": [],
        "lean": ["--pairs", "retrieval", "--neighbours", str(max(photos // 5, 1))],
    }


def measure(spec: str, out: Path, threads: int, options: Sequence[str]) -> dict[str, Any]:
    """One run, and its figures by name."""
    with common.open_set(spec) as photo_set:
        run = common.run_tool(photo_set.images, out, threads, options)
        figures = common.score(common.read_models(out / "sparse"), photo_set)
        every = len(photo_set.photos) * (len(photo_set.photos) - 1) // 2
    pairs = common.stage_counts(run).get("match", {}).get("pairs", 0)
    return figures | {
        "pairs": pairs,
        "share": round(pairs / every, 3),
        "seconds": round(run.seconds, 1),
        "failure": common.failure(run),
    }


def main() -> int:
    """Run the benchmark; 1 where the tool failed."""
    own, extra = common.split_arguments(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(own)
    rows: list[list[object]] = []
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for spec in options.sets or SETS:
            with common.open_set(spec) as photo_set:
                count = len(photo_set.photos)
            found = results[spec] = {
                name: measure(spec, Path(folder) / f"{spec}-{name}", options.threads, [*chosen, *extra])
                for name, chosen in choices(count).items()
            }
            for name, figures in found.items():
                loss = found["exhaustive"].get("auc5", 0.0) - figures.get("auc5", 0.0)
                figures["auc5_below_exhaustive"] = round(loss, 4)
                values = (figures.get(key) for key in ("pairs", "share", "registered", "auc1", "auc5", "seconds"))
                rows.append([spec, name, *values, figures["failure"]])
    common.print_table(["set", "pairs of", "pairs", "share", "reg", "AUC@1", "@5", "s", "failure"], rows)
    losses = [figures["auc5_below_exhaustive"] for found in results.values() for figures in found.values()]
    common.print_json(
        {
            "benchmark": "pairs",
            "auc5_lost_most": max(losses),
            "lean_share_highest": max(found["lean"]["share"] for found in results.values()),
            "sets": results,
        }
    )
    return int(any(figures["failure"] for found in results.values() for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
