"""Matches in straight pixels: those of pinhole cameras in the place of lenses that are known to distort.

Two-view geometry knows pinhole cameras only. Where a camera is known, everything from the first check to the verdict
therefore runs in the pixels that a pinhole camera would have had, and only what is stored of a verified pair is in the
photo's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from mast3r_sfm.colmap.lens import Lens
from mast3r_sfm.matching.check import EpipolarEdge, Pinhole, Putative
from mast3r_sfm.types import Bool, Encoding, Float64


@dataclass(frozen=True, kw_only=True)
class PairLenses:
    """What is known of the cameras of a pair."""

    first: Lens | None = None
    second: Lens | None = None
    scale: tuple[float, float] = field(default=(1.0, 1.0))
    """Photo pixels per network pixel of both."""

    @classmethod
    def of(cls, pair: tuple[int, int], views: tuple[Encoding, Encoding], lenses: Mapping[int, Lens]) -> PairLenses:
        """Those of a pair of images.

        Args:
            pair: indices of the images.
            views: their encodings.
            lenses: of the images whose cameras are known.
        """
        scale = views[0].transform.scale, views[1].transform.scale
        return cls(first=lenses.get(pair[0]), second=lenses.get(pair[1]), scale=scale)

    def straighten(self, putative: Putative) -> Putative:
        """The same matches in straight network pixels, without those that have none."""
        if self.first is None and self.second is None:
            return putative
        first, second = (
            xy if lens is None else lens.straighten(scale * xy) / scale
            for lens, scale, xy in zip(
                (self.first, self.second), self.scale, (putative.xy_first, putative.xy_second), strict=True
            )
        )
        straight = replace(putative, xy_first=first, xy_second=second, cameras=self._pinholes())
        usable: Bool = np.isfinite(np.concatenate([first, second], axis=1)).all(axis=1)
        return straight if usable.all() else straight.subset(usable)

    def _pinholes(self) -> tuple[Pinhole, Pinhole] | None:
        if self.first is None or self.second is None:
            return None
        one, two = self.scale
        return (
            Pinhole(focal_px=self.first.focal_px / one, centre_px=self.first.centre_px / one),
            Pinhole(focal_px=self.second.focal_px / two, centre_px=self.second.centre_px / two),
        )

    def bend(self, edge: EpipolarEdge) -> EpipolarEdge:
        """An edge with its matches in the photos' network pixels; its geometry stays that of straight ones."""
        first, second = (
            xy if lens is None else bend(lens, xy, scale)
            for lens, scale, xy in zip(
                (self.first, self.second), self.scale, (edge.xy_first, edge.xy_second), strict=True
            )
        )
        return replace(edge, xy_first=first, xy_second=second)


def bend(lens: Lens, xy: Float64, scale: float) -> Float64:
    """Straight network pixels [M, 2] to those of the photo [M, 2]; `scale` photo pixels make one."""
    return lens.bend(scale * xy) / scale
