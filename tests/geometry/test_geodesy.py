"""Positions on the earth in metres."""

from __future__ import annotations

import numpy as np
import pycolmap
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.geometry.geodesy import LocalFrame, earth_centred

places = st.tuples(st.floats(-89.9, 89.9), st.floats(-180, 180), st.floats(-400, 9000))


def test_earth_centred_positions() -> None:
    found = earth_centred([(0.0, 0.0, 0.0), (0.0, 90.0, 100.0), (90.0, 0.0, 0.0)])
    np.testing.assert_allclose(found, [[6378137.0, 0, 0], [0, 6378237.0, 0], [0, 0, 6356752.314]], atol=1e-3)
    # A second of arc to the north is about 31 metres anywhere, and one to the east half of that at 60 degrees.
    near = earth_centred([(60.0, 20.0, 0.0), (60.0 + 1 / 3600, 20.0, 0.0), (60.0, 20.0 + 1 / 3600, 0.0)])
    assert np.linalg.norm(near[1] - near[0]) == pytest.approx(30.95, abs=0.05)
    assert np.linalg.norm(near[2] - near[0]) == pytest.approx(15.5, abs=0.05)


@given(places)
def test_earth_centred_positions_are_those_of_colmap(place: tuple[float, float, float]) -> None:
    theirs = pycolmap.GPSTransform().ellipsoid_to_ecef(np.array([place]))
    np.testing.assert_allclose(earth_centred([place]), theirs, atol=1e-5)


@given(places, st.floats(-0.05, 0.05), st.floats(-0.05, 0.05), st.floats(-100, 100))
def test_local_positions_are_those_of_colmap(
    origin: tuple[float, float, float], north: float, east: float, up: float
) -> None:
    frame = LocalFrame(latitude_deg=origin[0], longitude_deg=origin[1], altitude_m=origin[2])
    place = (origin[0] + north, origin[1] + east, origin[2] + up)
    theirs = pycolmap.GPSTransform().ellipsoid_to_enu(np.array([place]), *origin)
    np.testing.assert_allclose(frame.local([place]), theirs, atol=1e-5)
    np.testing.assert_allclose(frame.local([origin]), np.zeros((1, 3)), atol=1e-8)


def test_east_north_and_up() -> None:
    frame = LocalFrame(latitude_deg=60.0, longitude_deg=20.0, altitude_m=100.0)
    second = 1 / 3600
    found = frame.local([(60.0, 20.0 + second, 100.0), (60.0 + second, 20.0, 100.0), (60.0, 20.0, 103.0)])
    np.testing.assert_allclose(found, [[15.5, 0, 0], [0, 30.95, 0], [0, 0, 3]], atol=0.05)


def test_the_frame_stands_in_the_middle_even_at_the_date_line() -> None:
    frame = LocalFrame.around([(10.0, 179.999, 1.0), (10.002, -179.999, 2.0), (10.001, -179.998, 9.0)])
    assert (frame.latitude_deg, frame.altitude_m) == (pytest.approx(10.001), 2.0)
    assert frame.longitude_deg == pytest.approx(-179.999)
    found = frame.local([(10.0, 179.999, 1.0), (10.002, -179.999, 2.0), (10.001, -179.998, 9.0)])
    assert np.abs(found).max() < 300
