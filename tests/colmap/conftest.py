"""A database of an exact scene."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.colmap.database import DatabaseContent, write_database
from mast3r_sfm.mapping.keypoints import share_keypoints
from mast3r_sfm.types import PairMatches, Rig
from tests.exact import Scene

MakeContent = Callable[..., DatabaseContent]


@pytest.fixture(scope="session")
def make_content() -> MakeContent:
    """make_content(scene, matches=…, focal_factor=…): all pairs of a scene by default."""

    def make(
        scene: Scene,
        matches: Sequence[PairMatches] | None = None,
        *,
        focal_factor: float = 1.0,
        camera_model: str = "SIMPLE_RADIAL",
        own_cameras: bool = False,
    ) -> DatabaseContent:
        number = len(scene.poses)
        if matches is None:
            matches = [scene.matches(*pair) for pair in combinations(range(number), 2)]
        keypoints, indices = share_keypoints(matches, number)
        rig = scene.rig(focal_factor=focal_factor)
        if own_cameras:
            rig = Rig(cameras=rig.cameras * number, camera_of_image=np.arange(number, dtype=np.int32))
        return DatabaseContent(
            names=[f"left/{image:02d}.jpg" for image in range(number)],
            rig=rig,
            camera_model=camera_model,
            keypoints=keypoints,
            matches=matches,
            indices=indices,
        )

    return make


@pytest.fixture
def make_database(make_content: MakeContent, tmp_path: Path) -> Callable[..., Path]:
    """make_database(scene, …): the path of a written database."""

    def make(*arguments: object, **values: object) -> Path:
        path = tmp_path / "database.db"
        write_database(path, make_content(*arguments, **values))
        return path

    return make
