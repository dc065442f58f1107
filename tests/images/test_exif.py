"""EXIF: what is read from good tags, and that no garbage costs a photo."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import IFDRational

from mast3r_sfm.config import PrepareConfig
from mast3r_sfm.images.exif import ExifData, focal_px, gps_position, orientation, read_exif
from mast3r_sfm.images.listing import list_images
from mast3r_sfm.progress import SilentProgress
from mast3r_sfm.types import Preparation

Textured = Callable[..., NDArray[np.uint8]]
BASE, GPS = ExifTags.Base, ExifTags.GPS


def roundtrip(tags: Image.Exif, extension: str = "JPEG") -> ExifData:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, extension, exif=tags)
    with Image.open(stream) as image:
        return read_exif(image, *image.size)


@pytest.mark.parametrize("extension", ["JPEG", "PNG", "WEBP"])
def test_all_tags_of_a_file(extension: str) -> None:
    tags = Image.Exif()
    tags[BASE.Orientation] = 6
    tags[BASE.Make] = "Maker \0"
    tags[BASE.Model] = " Model  1\0"
    tags.get_ifd(ExifTags.IFD.Exif)[BASE.FocalLengthIn35mmFilm] = 18
    gps = tags.get_ifd(ExifTags.IFD.GPSInfo)
    gps[GPS.GPSLatitudeRef], gps[GPS.GPSLatitude] = "S", (33.0, 30.0, 36.0)
    gps[GPS.GPSLongitudeRef], gps[GPS.GPSLongitude] = "W", (70.0, 15.0, 0.0)
    gps[GPS.GPSAltitudeRef], gps[GPS.GPSAltitude] = b"\x01", 12.5
    read = roundtrip(tags, extension)
    assert read.orientation == 6
    assert read.camera == "Maker Model 1"
    assert read.focal_px == pytest.approx(32)
    assert read.gps == pytest.approx((-33.51, -70.25, -12.5))


def test_no_tags() -> None:
    assert roundtrip(Image.Exif()) == ExifData()


class TestFocal:
    def test_35mm_equivalent_counts_on_the_long_side(self) -> None:
        assert focal_px({BASE.FocalLengthIn35mmFilm: 36}, 400, 300) == 400
        assert focal_px({BASE.FocalLengthIn35mmFilm: 36}, 300, 400) == 400

    def test_sensor_density_in_inches_and_the_size_when_taken(self) -> None:
        # A 22.2 mm wide sensor with 4,440 pixels, 50 mm lens; the file was shrunk to 1,110 pixels afterwards.
        tags = {
            BASE.FocalLength: 50.0,
            BASE.FocalPlaneXResolution: 4440 / 22.2 * 25.4,
            BASE.FocalPlaneResolutionUnit: 2,
            BASE.ExifImageWidth: 4440,
            BASE.ExifImageHeight: 2960,
        }
        assert focal_px(tags, 1110, 740) == pytest.approx(50 / 22.2 * 1110)
        assert focal_px(tags, 740, 1110) == pytest.approx(50 / 22.2 * 1110)

    @pytest.mark.parametrize(("unit", "millimetres"), [(2, 25.4), (3, 10.0), (4, 1.0), (None, 25.4), (77, 25.4)])
    def test_units_of_the_density(self, unit: int | None, millimetres: float) -> None:
        tags: dict[int, Any] = {BASE.FocalLength: 10.0, BASE.FocalPlaneXResolution: 100 * millimetres}
        if unit is not None:
            tags[BASE.FocalPlaneResolutionUnit] = unit
        assert focal_px(tags, 1000, 800) == pytest.approx(1000)

    def test_the_density_steps_in_where_the_equivalent_is_nonsense(self) -> None:
        tags = {BASE.FocalLengthIn35mmFilm: 0, BASE.FocalLength: 10.0, BASE.FocalPlaneXResolution: 2540.0}
        assert focal_px(tags, 1000, 800) == pytest.approx(1000)

    @pytest.mark.parametrize("value", [0, 1, 7, 721, 65535, float("nan"), float("inf"), -35, "35", b"35", None, (1, 2)])
    def test_unbelievable_values_are_absent(self, value: Any) -> None:
        assert focal_px({BASE.FocalLengthIn35mmFilm: value}, 1000, 800) is None

    def test_a_zero_denominator_is_absent(self) -> None:
        assert focal_px({BASE.FocalLength: IFDRational(5, 0), BASE.FocalPlaneXResolution: 100.0}, 1000, 800) is None


class TestGps:
    GOOD: ClassVar[dict[int, Any]] = {GPS.GPSLatitude: (10.0, 30.0, 0.0), GPS.GPSLongitude: (20.0, 0.0, 36.0)}

    def test_without_references_and_altitude(self) -> None:
        assert gps_position(self.GOOD) == pytest.approx((10.5, 20.01, 0.0))

    @pytest.mark.parametrize(
        "change",
        [
            {GPS.GPSLatitude: (91.0, 0.0, 0.0)},
            {GPS.GPSLongitude: (181.0, 0.0, 0.0)},
            {GPS.GPSLatitude: (IFDRational(0, 0), 0.0, 0.0)},
            {GPS.GPSLatitude: (1.0, 2.0)},
            {GPS.GPSLatitude: b"garbage"},
            {GPS.GPSLatitude: (0.0, 0.0, 0.0), GPS.GPSLongitude: (0.0, 0.0, 0.0)},
        ],
    )
    def test_impossible_positions_are_absent(self, change: dict[int, Any]) -> None:
        assert gps_position({**self.GOOD, **change}) is None


values = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=8),
    st.tuples(st.integers(), st.integers()).map(lambda pair: IFDRational(*pair)),
    st.fractions().map(lambda value: IFDRational(Fraction(value))),
    st.lists(st.floats() | st.integers() | st.binary(max_size=2), max_size=4).map(tuple),
)


def tags_of(*names: int) -> st.SearchStrategy[dict[int, Any]]:
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, values))


@given(
    tags_of(
        BASE.Orientation,
        BASE.FocalLengthIn35mmFilm,
        BASE.FocalLength,
        BASE.FocalPlaneXResolution,
        BASE.FocalPlaneResolutionUnit,
        BASE.ExifImageWidth,
        BASE.ExifImageHeight,
    )
)
def test_any_value_of_any_tag_gives_a_believable_number_or_none(tags: dict[int, Any]) -> None:
    focal = focal_px(tags, 1000, 800)
    assert focal is None or 200 <= focal <= 20_000
    assert orientation(tags) in range(1, 9)


@given(
    tags_of(
        GPS.GPSLatitude,
        GPS.GPSLatitudeRef,
        GPS.GPSLongitude,
        GPS.GPSLongitudeRef,
        GPS.GPSAltitude,
        GPS.GPSAltitudeRef,
    )
)
def test_any_gps_value_gives_a_place_on_earth_or_none(tags: dict[int, Any]) -> None:
    position = gps_position(tags)
    assert position is None or (abs(position[0]) <= 90 and abs(position[1]) <= 180 and abs(position[2]) < float("inf"))


def _good_exif() -> bytes:
    tags = Image.Exif()
    tags[BASE.Orientation] = 3
    tags[BASE.Make] = "Maker"
    tags.get_ifd(ExifTags.IFD.Exif)[BASE.FocalLength] = 5.5
    tags.get_ifd(ExifTags.IFD.GPSInfo)[GPS.GPSLatitude] = (1.0, 2.0, 3.0)
    return tags.tobytes()


@given(
    data=st.binary(max_size=200)
    | st.tuples(st.just(_good_exif()), st.integers(6, 130), st.binary(min_size=1, max_size=8)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + len(parts[2]) :]
    )
)
def test_no_exif_block_costs_a_photo(data: bytes, tmp_path_factory: pytest.TempPathFactory, textured: Textured) -> None:
    folder = tmp_path_factory.mktemp("exif")
    block = data if data.startswith(b"Exif\0\0") else b"Exif\0\0" + data
    for name, seed in (("a.jpg", 0), ("b.jpg", 1)):
        Image.fromarray(textured(72, 64, seed)).save(folder / name, exif=block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = list_images(folder, PrepareConfig(), SilentProgress())
    assert images.names == ("a.jpg", "b.jpg")
    assert images.records[0].orientation in range(1, 9)


def test_garbage_exif_photo_is_loaded_as_it_is(tmp_path: Path, textured: Textured) -> None:
    from mast3r_sfm.images.loading import load_image

    for name, seed in (("a.jpg", 0), ("b.jpg", 1)):
        Image.fromarray(textured(72, 64, seed)).save(tmp_path / name, exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01")
    images = list_images(tmp_path, PrepareConfig(), SilentProgress())
    assert [load_image(tmp_path, record, Preparation(size_px=512)).pixels.shape for record in images.records] == [
        (64, 72, 3)
    ] * 2
