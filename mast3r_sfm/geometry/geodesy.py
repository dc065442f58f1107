"""Positions on the earth in metres: the ellipsoid WGS 84, and a local frame that points east, north and up.

The formulas are those of the NGA standard NGA.STND.0036 (WGS 84), section 4, and of the rotation from the earth's frame
to the directions at one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.types import Float64

_EQUATOR_M = 6_378_137.0
_ECCENTRICITY2 = 6.694379990141e-3


def earth_centred(positions: Sequence[tuple[float, float, float]]) -> NDArray[np.float64]:
    """Latitude, longitude in degrees and altitude in metres to earth-centred coordinates [N, 3] in metres (WGS 84)."""
    latitude, longitude, altitude = np.array(positions, np.float64).reshape(-1, 3).T
    latitude, longitude = np.radians(latitude), np.radians(longitude)
    radius = _EQUATOR_M / np.sqrt(1 - _ECCENTRICITY2 * np.sin(latitude) ** 2)
    flat = (radius + altitude) * np.cos(latitude)
    return np.stack(
        [
            flat * np.cos(longitude),
            flat * np.sin(longitude),
            (radius * (1 - _ECCENTRICITY2) + altitude) * np.sin(latitude),
        ],
        axis=1,
    )


@dataclass(frozen=True, kw_only=True)
class LocalFrame:
    """Metres to the east, to the north and up from an origin; flat, so good for some kilometres."""

    latitude_deg: float
    longitude_deg: float
    altitude_m: float

    @classmethod
    def around(cls, positions: Sequence[tuple[float, float, float]]) -> LocalFrame:
        """The frame in the middle (median) of positions, at least one."""
        places = np.array(positions, np.float64)
        # Around the first one, so that positions on both sides of the date line lie side by side.
        offset = (places[:, 1] - places[0, 1] + 180) % 360 - 180
        longitude = (places[0, 1] + np.median(offset) + 180) % 360 - 180
        return cls(
            latitude_deg=float(np.median(places[:, 0])),
            longitude_deg=float(longitude),
            altitude_m=float(np.median(places[:, 2])),
        )

    def local(self, positions: Sequence[tuple[float, float, float]]) -> Float64:
        """Latitude, longitude in degrees and altitude in metres to east, north and up [N, 3] in metres."""
        latitude, longitude = np.radians([self.latitude_deg, self.longitude_deg])
        east = np.array([-np.sin(longitude), np.cos(longitude), 0.0])
        up = np.array([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)])
        axes = np.stack([east, np.cross(up, east), up])
        origin = earth_centred([(self.latitude_deg, self.longitude_deg, self.altitude_m)])
        metres: Float64 = (earth_centred(positions) - origin) @ axes.T
        return metres
