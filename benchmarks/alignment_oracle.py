"""How well pointmaps align rendered scenes whose truth is known, from the match stage on.

    python benchmarks/alignment_oracle.py [facade room object rotation] [--width 384] [--views 6] [--seed 0]

The oracle's matches are off by a pixel in either image, its depths by 1 % (smooth), the focal length of each pointmap
by 3 %, and its scale by 30 %. All pairs go through the match stage; focal lengths are unknown first, then known.
Errors are means: of relative rotations, of positions in percent of the longest baseline, of focal lengths. Around the
object, and from one point, there are twelve views unless --views says otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import common
import numpy as np

from mast3r_sfm.alignment.stage import Pinholes, align
from mast3r_sfm.alignment.turning import align_turns
from mast3r_sfm.config import AlignConfig, MatchConfig
from mast3r_sfm.geometry.rigid import angle_between_rotations, camera_centre
from mast3r_sfm.geometry.similarity import align_similarity
from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.stage import Matcher
from mast3r_sfm.synthetic.oracle import OracleModel, OracleNoise
from mast3r_sfm.synthetic.render import View, make_views
from mast3r_sfm.types import AlignmentResult, ImageRecord, LoadedImage, PixelTransform

NOISE = OracleNoise(pixel_px=1.0, depth_relative=0.01, log_scale=0.3, log_focal=0.03)
VIEWS = {"object": 12, "rotation": 12}
BARS = {"unknown": (0.3, 0.5, 1.0), "known": (0.15, 0.3, 0.0), "rotation": (0.2,)}


def no_sift(images: object) -> Any:
    """A dense model's pairs need none."""
    raise NotImplementedError(images)


def matched(views: Mapping[str, View], seed: int) -> tuple[Matcher, list[EpipolarEdge], list[ImageRecord]]:
    """All pairs after the two-view check."""
    records = [
        ImageRecord(name=name, width_px=view.camera.width_px, height_px=view.camera.height_px, sha256="0" * 64)
        for name, view in sorted(views.items())
    ]
    model = OracleModel(views, NOISE, seed)
    loaded = [
        LoadedImage(record=one, pixels=views[one.name].image, transform=PixelTransform(matrix=np.eye(2, 3)))
        for one in records
    ]
    checker = PairChecker(model=model, encodings=model.encode(loaded), config=MatchConfig(), seed=seed, threads=1)
    edges = [edge for some in checker.check(list(combinations(range(len(records)), 2))) for edge in some]
    return Matcher(checker=checker, num_images=len(records), detect_sift=no_sift), edges, records


def errors(result: AlignmentResult, views: Mapping[str, View]) -> list[float]:
    """Mean errors: degrees, percent of the longest baseline, percent of the focal length; NaN where there is none."""
    shown = [views[name] for name in sorted(views)]
    truth = np.array([shown[image].cam_from_world for image in result.images])
    first, second = np.triu_indices(len(truth), 1)
    relative = [pose[second, :, :3] @ pose[first, :, :3].transpose(0, 2, 1) for pose in (result.cam_from_world, truth)]
    turn = float(np.degrees(angle_between_rotations(relative[0], relative[1])).mean())
    found, centre = camera_centre(result.cam_from_world), camera_centre(truth)
    span = float(np.linalg.norm(centre[:, None] - centre[None], axis=-1).max())
    focal = 100 * float(np.abs(result.focal_px / shown[0].K[0, 0] - 1).mean()) if len(result.focal_px) else np.nan
    if span < 1e-6:
        return [turn, np.nan, focal]
    miss = align_similarity(found, centre, collinear_ok=True).apply(found) - centre
    return [turn, 100 * float(np.linalg.norm(miss, axis=1).mean()) / span, focal]


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="*", default=["facade", "room", "object", "rotation"])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--views", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows: list[list[object]] = []
    for kind in options.scenes:
        number = options.views or VIEWS.get(kind, 6)
        size = {"width_px": options.width, "height_px": options.width * 3 // 4}
        views = make_views(kind, number, **size, seed=options.seed, samples=1)
        matcher, edges, records = matched(views, options.seed)
        focal = next(iter(views.values())).K[0, 0]
        for known in (False, True):
            given = [replace(one, exif_focal_px=focal) if known else one for one in records]
            rig = matcher.estimate_rig(edges, given)
            matches = matcher.calibrate(edges, rig)
            begin = time.perf_counter()
            parts = align(matches, number, AlignConfig(), Pinholes(rig=rig, pixel_scale=1.0))
            parts += align_turns(matches, np.zeros(0, np.int32), rig, 1.0, AlignConfig()) if not parts else []
            for result in parts:
                seconds = time.perf_counter() - begin
                rows.append(
                    [kind, "known" if known else "unknown", f"{len(result.images)} of {number}"]
                    + [None if np.isnan(value) else round(value, 3) for value in errors(result, views)]
                    + [result.stop_reason, round(seconds, 1)]
                )
    names = ["scene", "focal length", "views", "rotation_deg", "position_percent", "focal_percent", "stopped", "s"]
    common.print_table(names, rows)
    common.print_json({"rows": [dict(zip(names, row, strict=True)) for row in rows], "bars": BARS, **vars(options)})


if __name__ == "__main__":
    main(sys.argv[1:])
