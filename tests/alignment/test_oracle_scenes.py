"""From the match stage to aligned pointmaps, on rendered scenes: the accuracy that noise of a pixel and 1 % leaves.

The views are 192 px wide, where a pixel is almost three times the angle that it is for a network of 512 px, which the
bars are meant for (`benchmarks/alignment_oracle.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from typing import Literal

import numpy as np
import pytest

from mast3r_sfm.alignment.stage import Pinholes, align
from mast3r_sfm.config import AlignConfig, MatchConfig
from mast3r_sfm.geometry.rigid import angle_between_rotations, camera_centre
from mast3r_sfm.geometry.similarity import align_similarity
from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.stage import Matcher
from mast3r_sfm.synthetic.render import View, make_views
from mast3r_sfm.types import AlignmentResult
from tests.exact import no_sift
from tests.scenes import load, oracle

VIEWS = 5
Kind = Literal["facade", "room"]


@lru_cache
def _matched(kind: Kind) -> tuple[Mapping[str, View], Matcher, list[EpipolarEdge]]:
    views = make_views(kind, VIEWS, width_px=192, height_px=144, samples=1)
    model = oracle(views, pixel_px=1.0, depth_relative=0.01, log_scale=0.3, log_focal=0.03)
    checker = PairChecker(model=model, encodings=model.encode(load(views)), config=MatchConfig(), seed=0, threads=1)
    edges = [edge for some in checker.check(list(combinations(range(VIEWS), 2))) for edge in some]
    return views, Matcher(checker=checker, num_images=VIEWS, detect_sift=no_sift), edges


def _aligned(kind: Kind, *, focal_is_known: bool) -> tuple[AlignmentResult, Mapping[str, View]]:
    views, matcher, edges = _matched(kind)
    focal = float(next(iter(views.values())).K[0, 0]) if focal_is_known else None
    records = [replace(image.record, exif_focal_px=focal) for image in load(views)]
    rig = matcher.estimate_rig(edges, records)
    (result,) = align(matcher.calibrate(edges, rig), VIEWS, AlignConfig(), Pinholes(rig=rig, pixel_scale=1.0))
    assert result.stop_reason.startswith("pointmaps settled")
    assert result.images.tolist() == list(range(VIEWS))
    return result, views


def _errors(result: AlignmentResult, views: Mapping[str, View]) -> tuple[float, float, float]:
    """Means: relative rotations in degrees, positions and focal length in percent."""
    truth = np.array([views[name].cam_from_world for name in sorted(views)])
    first, second = np.triu_indices(VIEWS, 1)
    relative = [pose[second, :, :3] @ pose[first, :, :3].transpose(0, 2, 1) for pose in (result.cam_from_world, truth)]
    found, centre = camera_centre(result.cam_from_world), camera_centre(truth)
    miss = align_similarity(found, centre, collinear_ok=True).apply(found) - centre
    span = float(np.linalg.norm(centre[:, None] - centre[None], axis=-1).max())
    return (
        float(np.degrees(angle_between_rotations(relative[0], relative[1])).mean()),
        100 * float(np.linalg.norm(miss, axis=1).mean()) / span,
        100 * float(np.abs(result.focal_px / next(iter(views.values())).K[0, 0] - 1).mean()),
    )


@pytest.mark.parametrize("kind", ["facade", "room"])
def test_poses_and_unknown_focal_lengths(kind: Kind) -> None:
    rotation, position, focal = _errors(*_aligned(kind, focal_is_known=False))
    assert 0.01 < rotation < 0.3
    assert 0.01 < position < 0.2
    assert 0.001 < focal < 1.0


@pytest.mark.parametrize("kind", ["facade", "room"])
def test_poses_with_a_known_focal_length(kind: Kind) -> None:
    rotation, position, focal = _errors(*_aligned(kind, focal_is_known=True))
    assert 0.01 < rotation < 0.15
    assert 0.01 < position < 0.2
    assert focal < 1e-9
