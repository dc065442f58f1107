"""Where photos were taken, and which way up, as their EXIF data says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mast3r_sfm.errors import InputError
from mast3r_sfm.images.decoding import open_image, stored_size
from mast3r_sfm.images.exif import read_exif


@dataclass(frozen=True, kw_only=True)
class PhotoPosition:
    """What EXIF says of one photo."""

    gps: tuple[float, float, float]
    """Latitude, longitude in degrees, altitude in metres; 0 where that is not known."""
    has_altitude: bool
    orientation: int
    """1–8."""


def read_positions(root: Path, names: Sequence[str]) -> dict[str, PhotoPosition]:
    """The positions of those of the photos `names` below `root` that have one; photos that are not there have none.

    Raises:
        InputError: `root` is no folder, or holds none of the photos.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder" if root.exists() else f"the folder {root} does not exist")
    present = [name for name in names if (root / name).is_file()]
    if not present:
        raise InputError(
            f"none of the model's photos is in {root}: looked for {', '.join(list(names)[:3])}; name the folder that "
            "the model was made from"
        )
    found = {}
    for name in present:
        # Pillow raises many types for broken files; such a photo tells nothing.
        try:
            with open_image(root / name) as image:
                exif = read_exif(image, *stored_size(image))
        except Exception:
            continue
        if exif.gps is not None:
            found[name] = PhotoPosition(gps=exif.gps, has_altitude=exif.has_altitude, orientation=exif.orientation)
    return found
