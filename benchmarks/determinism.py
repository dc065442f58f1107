"""The same command twice, into two fresh folders: do both give the same model?

    python benchmarks/determinism.py SET [--threads N] [-- OPTIONS OF THE TOOL]

The same means: the same images in the same models, the same tracks (sets of image name and keypoint), and poses within
1e-6: camera centres relative to the scene's size, rotations in radians.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import pycolmap

from mast3r_sfm.geometry.rigid import angle_between_rotations, camera_centre
from mast3r_sfm.types import Float64

LARGEST_DIFFERENCE = 1e-6
Track = frozenset[tuple[str, float, float]]


def tracks_of(model: pycolmap.Reconstruction) -> set[Track]:
    """Each 3D point as the set of its observations."""
    observations: dict[int, list[tuple[str, float, float]]] = defaultdict(list)
    for image in model.images.values():
        for keypoint in image.points2D:
            if keypoint.has_point3D():
                x, y = keypoint.xy
                observations[keypoint.point3D_id].append((image.name, float(x), float(y)))
    return {frozenset(track) for track in observations.values()}


def poses_of(model: pycolmap.Reconstruction) -> dict[str, Float64]:
    """cam_from_world [3, 4] by name, sorted."""
    poses = {image.name: image.cam_from_world().matrix() for image in model.images.values() if image.has_pose}
    return dict(sorted(poses.items()))


def compare_models(first: pycolmap.Reconstruction, second: pycolmap.Reconstruction) -> dict[str, Any]:
    """Differences between two models."""
    poses_first, poses_second = poses_of(first), poses_of(second)
    tracks_first, tracks_second = tracks_of(first), tracks_of(second)
    result: dict[str, Any] = {
        "images": len(poses_first),
        "tracks": len(tracks_first),
        "same_images": list(poses_first) == list(poses_second),
        "tracks_in_one_only": len(tracks_first ^ tracks_second),
    }
    if result["same_images"] and poses_first:
        stacked_first, stacked_second = (np.stack(list(poses.values())) for poses in (poses_first, poses_second))
        centres = camera_centre(stacked_first)
        size = max(float(np.linalg.norm(centres - centre, axis=1).max()) for centre in centres)
        moved = np.linalg.norm(centres - camera_centre(stacked_second), axis=1)
        result["centre_difference"] = float(moved.max()) / max(size, np.finfo(np.float64).tiny)
        turned = angle_between_rotations(stacked_first[:, :, :3], stacked_second[:, :, :3])
        result["rotation_difference_rad"] = float(turned.max())
    return result


def is_same(result: dict[str, Any]) -> bool:
    """Whether two models are the same for a user."""
    return bool(
        result["same_images"]
        and result["tracks_in_one_only"] == 0
        and max(result["centre_difference"], result["rotation_difference_rad"]) <= LARGEST_DIFFERENCE
    )


def run_twice(spec: str, threads: int, extra: Sequence[str]) -> dict[str, Any]:
    """Figures of two runs on one set."""
    with common.open_set(spec) as photo_set, tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / name for name in ("first", "second")]
        failures = [common.failure(common.run_tool(photo_set.images, out, threads, extra)) for out in outs]
        found = [
            [
                pycolmap.Reconstruction(str(path))
                for path in sorted((out / "sparse").glob("*/"), key=lambda p: int(p.name))
            ]
            for out in outs
        ]
    models = [compare_models(first, second) for first, second in zip(*found, strict=False)]
    return {
        "failures": [failure for failure in failures if failure],
        "models": models,
        "same": not any(failures) and len(found[0]) == len(found[1]) and all(map(is_same, models)),
    }


def main() -> int:
    """Run the benchmark; 1 where the two runs differ."""
    own, extra = common.split_arguments(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", metavar="SET")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(own)
    result = run_twice(options.set, options.threads, extra)
    for failure in result["failures"]:
        print(failure, file=sys.stderr)
    names = ["images", "tracks", "same_images", "tracks_in_one_only", "centre_difference", "rotation_difference_rad"]
    lines = [[index, *(model.get(name) for name in names)] for index, model in enumerate(result["models"])]
    common.print_table(["model", *names], lines)
    common.print_json({"benchmark": "determinism", "set": options.set, "threads": options.threads, **result})
    return 0 if result["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
