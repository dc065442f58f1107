"""From a folder to an ImageSet: what is found, what is left out and why, and who shares a camera."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from mast3r_sfm.config import PrepareConfig
from mast3r_sfm.errors import InputError
from mast3r_sfm.images.listing import list_images
from mast3r_sfm.types import ImageSet

Photo = Callable[..., Path]


def reasons(images: ImageSet) -> dict[str, str]:
    return {entry.name: entry.reason for entry in images.left_out}


def exif(**tags: Any) -> Image.Exif:
    result = Image.Exif()
    for name, value in tags.items():
        result[getattr(ExifTags.Base, name)] = value
    return result


def listing(root: Path, recorder: Any, **settings: Any) -> ImageSet:
    return list_images(root, PrepareConfig(**settings), recorder)


def test_photos_of_all_subfolders_are_listed_by_sorted_posix_name(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    for seed, name in enumerate(["b/z.JPG", "b/Änderung 1.png", "a.jpeg", "b/c/d.tiff", "photo one.webp", "z.bmp"]):
        photo(name, seed=seed)
    (tmp_path / "notes.txt").write_text("not a photo")
    photo(".hidden.jpg", seed=90)
    photo(".thumbnails/x.jpg", seed=91)
    images = listing(tmp_path, recorder)
    assert images.names == ("a.jpeg", "b/c/d.tiff", "b/z.JPG", "b/Änderung 1.png", "photo one.webp", "z.bmp")
    assert images.left_out == ()
    assert recorder.warnings == []
    assert recorder.stages == [("prepare", 6, "image")]
    assert (recorder.advanced, recorder.finished) == (6, 1)


def test_a_record_holds_size_hash_and_orientation_of_the_stored_file(
    tmp_path: Path, photo: Photo, recorder: Any
) -> None:
    path = photo("a.jpg", width=200, height=100, exif=exif(Orientation=6))
    photo("b.jpg", width=200, height=100, seed=1)
    record = listing(tmp_path, recorder).records[0]
    assert (record.width_px, record.height_px, record.orientation) == (200, 100, 6)
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_the_stored_size_of_a_turned_tiff_is_the_one_in_the_file(
    tmp_path: Path, photo: Photo, recorder: Any, compression: str
) -> None:
    photo("a.tif", width=200, height=100, exif=exif(Orientation=8), compression=compression)
    photo("b.tif", width=200, height=100, seed=1)
    record = listing(tmp_path, recorder).records[0]
    assert (record.width_px, record.height_px, record.orientation) == (200, 100, 8)


def test_unusable_files_are_left_out_with_a_reason_and_a_warning_each(
    tmp_path: Path, photo: Photo, recorder: Any
) -> None:
    photo("good1.jpg", seed=1)
    photo("good2.png", seed=2)
    whole = photo("whole.jpg", width=400, height=300, seed=3).read_bytes()
    (tmp_path / "whole.jpg").unlink()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    png = photo("whole.png", width=400, height=300, seed=3).read_bytes()
    (tmp_path / "whole.png").unlink()
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    (tmp_path / "text.jpg").write_text("I am a text file\n")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "missing.jpg")
    (tmp_path / "phone.HEIC").write_bytes(b"ftypheic")
    photo("icon.png", width=30, height=30)
    photo("narrow.png", width=500, height=63)
    Image.new("RGB", (200, 200)).save(tmp_path / "black.jpg")
    images = listing(tmp_path, recorder)
    assert images.names == ("good1.jpg", "good2.png")
    found = reasons(images)
    expected = {
        "cut.jpg": "truncated",
        "cut.png": "cannot be decoded",
        "text.jpg": "not a photo",
        "empty.jpg": "empty",
        "nowhere.jpg": "link to nowhere",
        "phone.HEIC": "convert",
        "icon.png": "too small",
        "narrow.png": "too small",
        "black.jpg": "no content",
    }
    assert set(found) == set(expected)
    for name, part in expected.items():
        assert part in found[name], name
        assert any(name in warning and found[name] in warning for warning in recorder.warnings), name


def test_a_pipe_named_like_a_photo_does_not_block(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    photo("a.jpg", seed=1)
    photo("b.jpg", seed=2)
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "regular file" in reasons(listing(tmp_path, recorder))["pipe.jpg"]


def test_raw_beside_its_jpeg_is_no_loss_and_raw_alone_is_named(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    photo("DSC_1.JPG", seed=1)
    photo("DSC_2.JPG", seed=2)
    for name in ("DSC_1.NEF", "dsc_2.nef", "DSC_3.NEF"):
        (tmp_path / name).write_bytes(b"raw")
    assert set(reasons(listing(tmp_path, recorder))) == {"DSC_3.NEF"}


def test_the_same_file_twice_counts_once(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    original = photo("b.jpg", seed=1)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/copy.jpg").write_bytes(original.read_bytes())
    (tmp_path / "a link.jpg").symlink_to(original)
    photo("z.jpg", seed=2)
    images = listing(tmp_path, recorder)
    assert images.names == ("a link.jpg", "z.jpg")
    assert reasons(images) == {"b.jpg": "the same file as a link.jpg", "sub/copy.jpg": "the same file as a link.jpg"}


def test_links_between_folders_end(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    photo("x/one.jpg", seed=1)
    photo("y/two.jpg", seed=2)
    (tmp_path / "x/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "y/side").symlink_to(tmp_path / "x", target_is_directory=True)
    (tmp_path / "x/side").symlink_to(tmp_path / "y", target_is_directory=True)
    assert listing(tmp_path, recorder).names == ("x/one.jpg", "y/two.jpg")


def test_a_linked_folder_outside_is_followed(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    photo("store/one.jpg", seed=1)
    photo("store/two.jpg", seed=2)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/day 1").symlink_to(tmp_path / "store", target_is_directory=True)
    assert listing(tmp_path / "root", recorder).names == ("day 1/one.jpg", "day 1/two.jpg")


def test_names_that_cannot_be_written_are_left_out_with_a_printable_name(
    tmp_path: Path, photo: Photo, recorder: Any
) -> None:
    content = photo("a.jpg", seed=1).read_bytes()
    photo("b.jpg", seed=2)
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(content)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (tmp_path / "new\nline.jpg").write_bytes(content)
    images = listing(tmp_path, recorder)
    assert images.names == ("a.jpg", "b.jpg")
    assert set(reasons(images)) == {"caf\\xe9.jpg", "new\\nline.jpg"}
    assert all(entry.name.encode("utf-8").isascii() for entry in images.left_out)


def test_a_photo_above_pillows_limit_is_fine_and_above_ours_is_left_out(
    tmp_path: Path, photo: Photo, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # every photo here is more than twice as large
    for seed, name in enumerate(["a.jpg", "b.png", "c.tif", "d.webp"]):
        photo(name, seed=seed)
    photo("large.jpg", width=300, height=300, seed=9)
    images = listing(tmp_path, recorder, max_pixels=50_000)
    assert images.names == ("a.jpg", "b.png", "c.tif", "d.webp")
    assert "50000" in reasons(images)["large.jpg"]
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_nothing_of_the_process_is_changed_for_good(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    import warnings

    photo("a.jpg", seed=1)
    photo("b.jpg", seed=2)
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters), threading.active_count())
    listing(tmp_path, recorder)
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters), threading.active_count()) == before


def test_a_dim_photo_has_content_and_a_noisy_lens_cap_has_none(tmp_path: Path, recorder: Any) -> None:
    rng = np.random.default_rng(0)
    dim = np.repeat(np.repeat(rng.integers(0, 12, (15, 20), dtype=np.uint8), 8, 0), 8, 1)
    Image.fromarray(dim).save(tmp_path / "dim.png")
    Image.fromarray(dim[::-1].copy()).save(tmp_path / "dim2.png")
    Image.fromarray(rng.integers(0, 3, (120, 160), dtype=np.uint8)).save(tmp_path / "cap.png")
    images = listing(tmp_path, recorder)
    assert images.names == ("dim.png", "dim2.png")
    assert "no content" in reasons(images)["cap.png"]


class TestErrors:
    def test_no_folder(self, tmp_path: Path, recorder: Any) -> None:
        with pytest.raises(InputError, match="does not exist"):
            listing(tmp_path / "missing", recorder)

    def test_a_file(self, photo: Photo, recorder: Any) -> None:
        with pytest.raises(InputError, match="not a folder"):
            listing(photo("a.jpg"), recorder)

    def test_an_empty_folder(self, tmp_path: Path, recorder: Any) -> None:
        with pytest.raises(InputError, match=r"is empty.*\.jpg"):
            listing(tmp_path, recorder)

    def test_no_photos_says_what_was_looked_for_and_found(self, tmp_path: Path, recorder: Any) -> None:
        for name in ("a.mp4", "b.mp4", "README"):
            (tmp_path / name).write_text("x")
        with pytest.raises(InputError, match=r"looked for .*\.jpg.*found 2 × \.mp4, 1 × no extension"):
            listing(tmp_path, recorder)

    def test_one_photo(self, tmp_path: Path, photo: Photo, recorder: Any) -> None:
        photo("alone.jpg")
        with pytest.raises(InputError, match=r"two photos .* are needed.*only alone\.jpg"):
            listing(tmp_path, recorder)

    def test_one_usable_photo_names_the_others_up_to_ten(self, tmp_path: Path, photo: Photo, recorder: Any) -> None:
        photo("alone.jpg")
        for index in range(12):
            (tmp_path / f"bad{index:02d}.jpg").write_text("text")
        with pytest.raises(InputError) as raised:
            listing(tmp_path, recorder)
        text = str(raised.value)
        assert "bad00.jpg: not a photo" in text
        assert "bad09.jpg" in text
        assert "bad10.jpg" not in text
        assert "and 2 more" in text

    def test_all_black(self, tmp_path: Path, recorder: Any) -> None:
        for level in (0, 1, 255):
            Image.new("L", (100, 100), level).save(tmp_path / f"{level}.png")
        with pytest.raises(InputError, match=r"none of those(?s:.*)1\.png: no content"):
            listing(tmp_path, recorder)

    def test_only_unsupported_photos(self, tmp_path: Path, recorder: Any) -> None:
        for name in ("a.heic", "b.heic"):
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=r"a\.heic: \.heic files cannot be read"):
            listing(tmp_path, recorder)


class TestCameraGroups:
    @pytest.fixture
    def folder(self, tmp_path: Path, photo: Photo) -> Path:
        def lens(focal_mm: float, model: str = "X1") -> Image.Exif:
            tags = exif(Make="Maker", Model=model)
            tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = focal_mm
            return tags

        photo("a/1.jpg", seed=1, exif=lens(35))
        photo("a/2.jpg", seed=2, exif=lens(35))
        photo("a/3.jpg", seed=3, exif=lens(70))
        photo("b/4.jpg", seed=4, exif=lens(35))
        photo("b/5.jpg", seed=5, exif=lens(35, "X2"))
        photo("b/6.jpg", seed=6, width=90, height=120, exif=lens(35))
        photo("b/7.jpg", seed=7)
        photo("b/8.jpg", seed=8)
        return tmp_path

    @pytest.mark.parametrize(
        ("cameras", "expected"),
        [
            ("auto", [0, 0, 1, 0, 2, 3, 4, 4]),
            ("single", [0, 0, 0, 0, 0, 1, 0, 0]),
            ("folder", [0, 0, 0, 1, 1, 2, 1, 1]),
            ("image", [0, 1, 2, 3, 4, 5, 6, 7]),
        ],
    )
    def test_who_shares_a_camera(self, folder: Path, recorder: Any, cameras: str, expected: list[int]) -> None:
        groups = [record.camera_group for record in listing(folder, recorder, cameras=cameras).records]
        order = list(dict.fromkeys(groups))
        assert [order.index(group) for group in groups] == expected


def test_two_runs_give_the_same_set(tmp_path: Path, photo: Photo, recorder: Any) -> None:
    for seed in range(12):
        photo(f"{seed % 3}/{seed}.jpg", seed=seed % 9)
    assert listing(tmp_path, recorder) == listing(tmp_path, recorder)


def test_real_photos_are_all_usable(data_dir: Path, recorder: Any) -> None:
    images = listing(data_dir / "opensfm_lund" / "images", recorder)
    assert len(images) == 29
    assert images.left_out == ()
    record = images.records[0]
    assert record.gps == pytest.approx((55.698167, 13.195389, 37.0), abs=1e-6)
    assert record.exif_focal_px == pytest.approx(35 / 36 * 1024)
