"""Render a synthetic scene as photos with true poses: how the photos in examples/house were made.

python examples/make_scene.py OUT [--kind facade] [--photos 12] [--size 800 600] [--seed 4]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mast3r_sfm.synthetic.photos import write_photos
from mast3r_sfm.synthetic.render import make_views


def main() -> None:
    """Parse the arguments, render, write."""
    parser = argparse.ArgumentParser(description="Render a synthetic scene as photos with true poses.")
    parser.add_argument("output", type=Path, help="folder for images/ and gt.json")
    parser.add_argument("--kind", choices=["room", "facade", "object", "plane", "rotation"], default="facade")
    parser.add_argument("--photos", type=int, default=12)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 600), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--seed", type=int, default=4)
    arguments = parser.parse_args()
    width, height = arguments.size
    views = make_views(arguments.kind, arguments.photos, width_px=width, height_px=height, seed=arguments.seed)
    write_photos(arguments.output, views)
    print(f"{len(views)} photos in {arguments.output / 'images'}, their poses in {arguments.output / 'gt.json'}")


if __name__ == "__main__":
    main()
