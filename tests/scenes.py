"""Small synthetic scenes with truth, which the tests of every stage stand on.

    from tests.scenes import facade_views, image_set, load, oracle

    views = facade_views()                       # {"0000.jpg": View, …}, rendered once per run of the tests
    encodings = (model := oracle(views)).encode(load(views))

Views are 128 × 96 px and rendering one takes about 0.2 s; everything is cached, so nobody may write into the arrays
(they are read-only). `second_from_first` is the true relative pose of two views.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from mast3r_sfm.geometry.rigid import compose_poses, invert_pose
from mast3r_sfm.synthetic.cameras import Kind
from mast3r_sfm.synthetic.oracle import OracleModel, OracleNoise
from mast3r_sfm.synthetic.photos import write_photos
from mast3r_sfm.synthetic.render import View, make_views
from mast3r_sfm.types import Float64, ImageRecord, ImageSet, LoadedImage, PixelTransform

WIDTH_PX, HEIGHT_PX = 128, 96


@lru_cache
def scene_views(kind: Kind, number: int = 6, seed: int = 0) -> Mapping[str, View]:
    """Views of a kind of scene by name, in order of the camera's path."""
    views = make_views(kind, number, width_px=WIDTH_PX, height_px=HEIGHT_PX, seed=seed)
    for view in views.values():
        for array in (view.image, view.depth, view.points_world, view.cam_from_world, view.K):
            array.flags.writeable = False
    return views


def facade_views(number: int = 6) -> Mapping[str, View]:
    """An arc in front of a house; every view overlaps every other."""
    return scene_views("facade", number)


def room_views(number: int = 6) -> Mapping[str, View]:
    """Inside a furnished room; the first and the last view hardly overlap."""
    return scene_views("room", number)


def object_views(number: int = 18) -> Mapping[str, View]:
    """A closed orbit around things on a pedestal; views across from each other share little but the ground."""
    return scene_views("object", number)


def plane_views(number: int = 4) -> Mapping[str, View]:
    """One plane, with parallax."""
    return scene_views("plane", number)


def rotation_views(number: int = 6) -> Mapping[str, View]:
    """The room from one point: no parallax at all."""
    return scene_views("rotation", number)


def record(name: str, view: View, scale: int = 1) -> ImageRecord:
    """The view as a photo on disk, `scale` times as large as the view."""
    return ImageRecord(
        name=name, width_px=scale * view.camera.width_px, height_px=scale * view.camera.height_px, sha256="0" * 64
    )


def load(views: Mapping[str, View]) -> list[LoadedImage]:
    """The views as the images stage would load them, sorted by name."""
    return [
        LoadedImage(record=record(name, view), pixels=view.image, transform=PixelTransform(matrix=np.eye(2, 3)))
        for name, view in sorted(views.items())
    ]


def image_set(views: Mapping[str, View], root: Path = Path("photos")) -> ImageSet:
    """The views as the prepare stage would list them; the photos need not exist."""
    return ImageSet(root=root, records=tuple(record(name, view) for name, view in sorted(views.items())))


def photo_folder(folder: Path, views: Mapping[str, View]) -> Path:
    """Write the photos and gt.json into a folder; gives the folder with the photos."""
    write_photos(folder, views)
    return folder / "images"


def oracle(views: Mapping[str, View], seed: int = 0, **noise: float) -> OracleModel:
    """A dense model that knows the truth of the views; `noise` names fields of OracleNoise."""
    return OracleModel(views, OracleNoise(**noise), seed)


def second_from_first(first: View, second: View) -> Float64:
    """[3, 4] true relative pose."""
    return compose_poses(second.cam_from_world, invert_pose(first.cam_from_world))
