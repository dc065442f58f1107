"""What COLMAP's camera models do to pixels: between those of a photo and those of a pinhole camera in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pycolmap

from mast3r_sfm.types import Camera, Float64, PairMatches, Rig

_EXACT_PX = 0.01


@dataclass(frozen=True, kw_only=True)
class Lens:
    """A known camera, beside the pinhole camera of the same mean focal length and principal point.

    Pixels of that pinhole camera are called straight: straight lines of the world are straight in them.
    """

    camera: Camera

    @property
    def focal_px(self) -> float:
        """Mean focal length."""
        return float(self._colmap().mean_focal_length())

    @property
    def centre_px(self) -> Float64:
        """[2] principal point."""
        camera = self._colmap()
        return np.array([camera.principal_point_x, camera.principal_point_y])

    def straighten(self, xy: Float64) -> Float64:
        """Photo pixels [M, 2] to straight ones [M, 2]; NaN where they look aside by a right angle or more."""
        xy = np.asarray(xy, np.float64)
        seen = np.asarray(self._colmap().cam_from_img(xy), np.float64).reshape(-1, 2)
        straight: Float64 = self.focal_px * seen + self.centre_px
        # Beyond what its model can invert, COLMAP gives some direction or other.
        with np.errstate(invalid="ignore"):
            wrong = ~(np.abs(self.bend(straight) - xy).max(axis=1, initial=0.0) < _EXACT_PX)
        straight[wrong] = np.nan
        return straight

    def bend(self, xy: Float64) -> Float64:
        """Straight pixels [M, 2] to photo pixels [M, 2]; the inverse of `straighten`."""
        directions = (np.asarray(xy, np.float64) - self.centre_px) / self.focal_px
        local = np.concatenate([directions, np.ones((len(directions), 1))], axis=1)
        return np.asarray(self._colmap().img_from_cam(local), np.float64).reshape(-1, 2)

    def _colmap(self) -> pycolmap.Camera:
        return pycolmap.Camera(
            model=self.camera.model,
            width=self.camera.width_px,
            height=self.camera.height_px,
            params=self.camera.params.tolist(),
        )


def straighten_matches(matches: Sequence[PairMatches], rig: Rig) -> tuple[list[PairMatches], Rig]:
    """Matches in straight pixels, and the cameras with pinhole ones in the place of those that were given."""
    lenses = {number: Lens(camera=camera) for number, camera in enumerate(rig.cameras) if camera.is_given}
    if not lenses:
        return list(matches), rig

    def straight(image: int, xy: Float64) -> Float64:
        lens = lenses.get(int(rig.camera_of_image[image]))
        return xy if lens is None else lens.straighten(xy)

    cameras = list(rig.cameras)
    for number, lens in lenses.items():
        params = np.array([lens.focal_px, *lens.centre_px])
        cameras[number] = replace(cameras[number], model="SIMPLE_PINHOLE", params=params)
    moved = [
        replace(
            match, xy_first=straight(match.first, match.xy_first), xy_second=straight(match.second, match.xy_second)
        )
        for match in matches
    ]
    return moved, replace(rig, cameras=tuple(cameras))
