"""What EXIF says of a photo. Malformed values count as absent: no photo is lost because of its metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image

_MM_PER_UNIT = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}
"""FocalPlaneResolutionUnit: inch, centimetre, millimetre, micrometre."""
_FOCAL_RANGE = (0.2, 20.0)
"""Believable focal lengths in units of the photo's long side: from a fisheye to a 720 mm lens."""


@dataclass(frozen=True, kw_only=True)
class ExifData:
    """The tags that matter here, checked."""

    orientation: int = 1
    """1–8."""
    focal_px: float | None = None
    """In stored pixels."""
    gps: tuple[float, float, float] | None = None
    """Latitude, longitude in degrees, altitude in metres (0 where only the position is known)."""
    has_altitude: bool = False
    """The altitude is known."""
    camera: str = ""
    """Maker and model."""


def read_exif(image: Image.Image, width_px: int, height_px: int) -> ExifData:
    """Read the tags of an opened photo whose stored pixels are width × height. Never raises for malformed EXIF."""
    base = _directory(image)
    photo = _directory(image, ExifTags.IFD.Exif)
    gps = _directory(image, ExifTags.IFD.GPSInfo)
    return ExifData(
        orientation=orientation(base),
        focal_px=focal_px(photo, width_px, height_px),
        gps=gps_position(gps),
        has_altitude=_number(gps.get(ExifTags.GPS.GPSAltitude)) is not None,
        camera=" ".join(filter(None, (_text(base.get(ExifTags.Base.Make)), _text(base.get(ExifTags.Base.Model))))),
    )


def orientation(tags: Mapping[int, Any]) -> int:
    """EXIF orientation 1–8; 1 where absent or impossible."""
    value = tags.get(ExifTags.Base.Orientation)
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else 1


def focal_px(tags: Mapping[int, Any], width_px: int, height_px: int) -> float | None:
    """Focal length in stored pixels from the tags of the Exif directory, or None.

    FocalLengthIn35mmFilm / 36 mm · long side, as 35 mm film is 36 mm wide. Where that tag is absent: FocalLength ·
    FocalPlaneXResolution, corrected by the size the photo had when it was taken (PixelXDimension). Values outside
    0.2 to 20 long sides are not believed.
    """
    long_side = max(width_px, height_px)
    candidates = (_focal_from_35mm(tags, long_side), _focal_from_sensor(tags, long_side))
    low, high = (factor * long_side for factor in _FOCAL_RANGE)
    return next((value for value in candidates if value is not None and low <= value <= high), None)


def gps_position(tags: Mapping[int, Any]) -> tuple[float, float, float] | None:
    """Latitude and longitude in degrees, altitude in metres, from the tags of the GPS directory, or None."""
    latitude = _degrees(tags.get(ExifTags.GPS.GPSLatitude), tags.get(ExifTags.GPS.GPSLatitudeRef), "S")
    longitude = _degrees(tags.get(ExifTags.GPS.GPSLongitude), tags.get(ExifTags.GPS.GPSLongitudeRef), "W")
    if latitude is None or longitude is None or abs(latitude) > 90 or abs(longitude) > 180:
        return None
    if latitude == 0 and longitude == 0:
        return None  # what cameras without a fix write
    altitude = _number(tags.get(ExifTags.GPS.GPSAltitude)) or 0.0
    below_sea = tags.get(ExifTags.GPS.GPSAltitudeRef) in (1, b"\x01")
    return latitude, longitude, -altitude if below_sea else altitude


def _directory(image: Image.Image, which: ExifTags.IFD | None = None) -> dict[int, Any]:
    # Pillow raises half a dozen types for malformed EXIF (SyntaxError, struct.error, KeyError …); whatever it is, the
    # photo itself is fine.
    try:
        tags = image.getexif()
        return dict(tags if which is None else tags.get_ifd(which))
    except Exception:
        return {}


def _focal_from_35mm(tags: Mapping[int, Any], long_side: int) -> float | None:
    focal_mm = _number(tags.get(ExifTags.Base.FocalLengthIn35mmFilm))
    return None if focal_mm is None else focal_mm / 36.0 * long_side


def _focal_from_sensor(tags: Mapping[int, Any], long_side: int) -> float | None:
    focal_mm = _number(tags.get(ExifTags.Base.FocalLength))
    density = _number(tags.get(ExifTags.Base.FocalPlaneXResolution))
    if focal_mm is None or density is None:
        return None
    unit_mm = _MM_PER_UNIT.get(_integer(tags.get(ExifTags.Base.FocalPlaneResolutionUnit)) or 2, 25.4)
    taken = (_number(tags.get(ExifTags.Base.ExifImageWidth)), _number(tags.get(ExifTags.Base.ExifImageHeight)))
    taken_long_side = max((side for side in taken if side), default=float(long_side))
    return focal_mm / unit_mm * density * long_side / taken_long_side


def _number(value: Any) -> float | None:
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _degrees(value: Any, reference: Any, negative: str) -> float | None:
    if not isinstance(value, tuple) or len(value) != 3:
        return None
    parts = [_number(part) for part in value]
    if parts[0] is None:
        return None
    degrees = parts[0] + (parts[1] or 0.0) / 60 + (parts[2] or 0.0) / 3600
    return -degrees if _text(reference).upper().startswith(negative) else degrees


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("ascii", "ignore")
    if not isinstance(value, str):
        return ""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in value).split())[:64]
