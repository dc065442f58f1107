"""Reconstruct a folder of photos from Python and print what came out.

python examples/reconstruct_folder.py PHOTOS OUT
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mast3r_sfm.config import Config, PairsConfig, RunOptions
from mast3r_sfm.pipeline import reconstruct
from mast3r_sfm.progress import SilentProgress


class PrintedWarnings(SilentProgress):
    """Prints what a user must know and drops the rest. A program with a window would draw a bar instead."""

    def warn(self, message: str) -> None:
        """Print a warning."""
        print(f"warning: {message}")


def main() -> None:
    """Parse the arguments, reconstruct, print."""
    parser = argparse.ArgumentParser(description="Reconstruct a folder of photos.")
    parser.add_argument("images", type=Path, help="folder with photos, sub-folders included")
    parser.add_argument("output", type=Path, help="folder for the results")
    arguments = parser.parse_args()

    # Settings that can change the result are in Config; how to run, which cannot, is in RunOptions.
    config = Config(seed=1, pairs=PairsConfig(neighbours=8))
    report = reconstruct(arguments.images, arguments.output, config, RunOptions(threads=2), PrintedWarnings())

    print(f"{report.num_registered} of {report.num_images} images registered, model {report.model}")
    for model in report.models:
        print(f"{model.path}: {model.points} points, mean track length {model.mean_track_length:.2f}")
        for name in model.images:
            print(f"  {name}")
    for photo in report.left_out:
        print(f"left out {photo.name}: {photo.reason}")


if __name__ == "__main__":
    main()
