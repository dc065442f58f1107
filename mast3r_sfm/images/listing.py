"""From a folder to an ImageSet: every photo is found, decoded once, and either usable or left out with a reason."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from mast3r_sfm.config import PrepareConfig
from mast3r_sfm.errors import InputError
from mast3r_sfm.images.decoding import decode, is_decoded_upright, open_image, stored_size, to_rgb
from mast3r_sfm.images.exif import ExifData, read_exif
from mast3r_sfm.images.masks import MaskFolder
from mast3r_sfm.progress import Progress, steps
from mast3r_sfm.types import ImageRecord, ImageSet, LeftOut

EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .tif .tiff .webp .avif .bmp .ppm .pgm .pnm .jp2 .gif".split()  # noqa: SIM905
)
"""Files that are taken for photos."""
UNSUPPORTED = frozenset(
    ".heic .heif .dng .nef .cr2 .cr3 .arw .raf .orf .rw2 .pef .srw".split()  # noqa: SIM905
)
"""Photos in formats that cannot be read; they are named rather than passed over in silence."""

MIN_SIDE_PX = 64
_CONTENT_SAMPLE_PX = 256
_MIN_CONTRAST = 4
"""Grey levels of 255 between the darkest and the brightest percent of a photo with content."""
_THREADS = 4
_LARGE_PX = 50_000_000
_SHOWN_REASONS = 10


def list_images(root: Path, config: PrepareConfig, progress: Progress) -> ImageSet:
    """Find the photos below `root` and check each by decoding it once.

    Sub-folders and links are followed, hidden files and folders are not looked at. A photo that cannot be used
    (unreadable, truncated, above `max_pixels`, below 64 pixels, without content, the same file as another) is in
    `left_out` of the result, with a warning. Reports its steps as the stage "prepare". Where masks are given, they are
    attached, and a photo that its mask hides as a whole is left out, too; the masks' folder is not searched for photos.

    Returns:
        Records sorted by name. Photos with an equal `camera_group` share intrinsics; see `PrepareConfig.cameras`.

    Raises:
        InputError: `root` is no folder, holds no photos, or fewer than two of them can be used; or the masks cannot.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder" if root.exists() else f"the folder {root} does not exist")
    masks = MaskFolder.open(config.mask_path, root) if config.mask_path else None
    files, left_out = _find(root, skip=masks.path if masks else None)
    names = sorted(name for name in files if _suffix(name) in EXTENSIONS)
    left_out += _unsupported(files, names)
    if not names and not left_out:
        raise InputError(_nothing_found(root, files))
    records: list[ImageRecord] = []
    inspector = _Inspector(root, config)
    with (
        steps(progress, "prepare", len(names), "image"),
        warnings.catch_warnings(),
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        # Pillow warns of malformed metadata, which counts as absent here.
        warnings.simplefilter("ignore")
        for outcome in pool.map(inspector.inspect, names):
            progress.advance()
            if isinstance(outcome, LeftOut):
                left_out.append(outcome)
            else:
                records.append(outcome)
    records, duplicates = _without_duplicates(records)
    left_out += duplicates
    if masks and records:
        records, hidden = masks.attach(records, progress)
        left_out += hidden
    left_out = sorted(left_out, key=lambda entry: entry.name)
    if len(records) < 2:
        raise InputError(_too_few(root, records, left_out))
    for entry in left_out:
        progress.warn(f"{entry.name} is left out: {entry.reason}")
    return ImageSet(root=root, records=tuple(records), left_out=tuple(left_out))


class _Inspector:
    """Opens photos, several at a time."""

    def __init__(self, root: Path, config: PrepareConfig) -> None:
        self._root = root
        self._config = config
        self._large = threading.Lock()

    def inspect(self, name: str) -> ImageRecord | LeftOut:
        path = self._root / name
        if not path.is_file():
            return LeftOut(name=name, reason="a link to nowhere" if path.is_symlink() else "not a regular file")
        try:
            with path.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            with open_image(path) as image:
                return self._check(name, sha256, image)
        # Pillow raises many types for broken files; none of them may end the run for the sake of one photo.
        except Exception as error:
            return LeftOut(name=name, reason=_explain(path, error))

    def _check(self, name: str, sha256: str, image: Image.Image) -> ImageRecord | LeftOut:
        width, height = stored_size(image)
        if width * height > self._config.max_pixels:
            limit = f"prepare.max_pixels = {self._config.max_pixels}"
            return LeftOut(name=name, reason=f"{width}×{height} pixels are more than {limit}; shrink it or raise that")
        if min(width, height) < MIN_SIDE_PX:
            return LeftOut(name=name, reason=f"too small: {width}×{height} pixels, the least is {MIN_SIDE_PX}")
        if width * height > _LARGE_PX:
            with self._large:  # one at a time, for the memory's sake
                exif, has_content = _decode(image, width, height)
        else:
            exif, has_content = _decode(image, width, height)
        if not has_content:
            return LeftOut(name=name, reason="no content: all its pixels are nearly equal")
        return ImageRecord(
            name=name,
            width_px=width,
            height_px=height,
            sha256=sha256,
            orientation=exif.orientation,
            exif_focal_px=exif.focal_px,
            gps=exif.gps,
            camera_group=_camera_group(name, width, height, exif, self._config),
        )


def _decode(image: Image.Image, width: int, height: int) -> tuple[ExifData, bool]:
    # Decoding a TIFF takes its orientation away; asking a PNG for its EXIF would decode it, and hide that it is broken.
    exif_first = is_decoded_upright(image)
    exif = read_exif(image, width, height) if exif_first else ExifData()
    decode(image, at_least=(_CONTENT_SAMPLE_PX, _CONTENT_SAMPLE_PX))
    if not exif_first:
        exif = read_exif(image, width, height)
    sample_size = (min(image.width, _CONTENT_SAMPLE_PX), min(image.height, _CONTENT_SAMPLE_PX))
    sample = to_rgb(image.resize(sample_size, Image.Resampling.NEAREST))
    low, high = np.percentile(np.asarray(sample), (1, 99), axis=(0, 1))
    return exif, bool((high - low).max() >= _MIN_CONTRAST)


def _camera_group(name: str, width: int, height: int, exif: ExifData, config: PrepareConfig) -> str:
    size = f"{width}x{height}"
    match config.cameras:
        case "single":
            return size
        case "folder":
            return f"{PurePosixPath(name).parent}/{size}"
        case "image":
            return name
    focal = "" if exif.focal_px is None else f"f{round(exif.focal_px)}"
    return " ".join(filter(None, (size, exif.camera, focal)))


def _explain(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if path.stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "not a photo in any known format, whatever its name says"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it; shrink it"
    return f"cannot be decoded: {error}"


def _find(root: Path, skip: Path | None) -> tuple[list[str], list[LeftOut]]:
    """Names of all files below the root, but not below `skip`, that are not hidden; what cannot be entered or named."""
    files: list[str] = []
    left_out: list[LeftOut] = []
    for path in _walk(root, skip, left_out):
        name = os.path.relpath(path, root).replace(os.sep, "/")
        fault = _fault_of_name(name)
        if fault and _suffix(name) in EXTENSIONS:
            left_out.append(LeftOut(name=_printable(name), reason=f"its name {fault}; rename it"))
        elif not fault:
            files.append(name)
    return files, left_out


def _fault_of_name(name: str) -> str:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    return "" if name.isprintable() else "has control characters"


def _walk(root: Path, skip: Path | None, left_out: list[LeftOut]) -> Iterator[str]:
    """Paths of the files below the root; each real folder is entered once, links only after the real folders."""
    folders, linked = [os.fspath(root)], list[str]()
    seen: set[tuple[int, int]] = set()
    if skip is not None:
        status = skip.stat()
        seen.add((status.st_dev, status.st_ino))
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        try:
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            name = _printable(os.path.relpath(folder, root).replace(os.sep, "/"))
            left_out.append(LeftOut(name=name, reason=f"the folder cannot be opened: {error.strerror}"))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (linked if entry.is_symlink() else folders).append(entry.path)
            else:
                yield entry.path


def _printable(name: str) -> str:
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _unsupported(files: Sequence[str], photos: Sequence[str]) -> list[LeftOut]:
    # Cameras write a JPEG beside each raw file; then nothing is missing.
    known = {str(PurePosixPath(name).with_suffix("")).lower() for name in photos}
    return [
        LeftOut(name=name, reason=f"{_suffix(name)} files cannot be read; convert it to JPEG, PNG or TIFF")
        for name in files
        if _suffix(name) in UNSUPPORTED and str(PurePosixPath(name).with_suffix("")).lower() not in known
    ]


def _without_duplicates(records: Sequence[ImageRecord]) -> tuple[list[ImageRecord], list[LeftOut]]:
    first: dict[str, str] = {}
    left_out = []
    for record in records:
        if first.setdefault(record.sha256, record.name) != record.name:
            left_out.append(LeftOut(name=record.name, reason=f"the same file as {first[record.sha256]}"))
    dropped = {entry.name for entry in left_out}
    return [record for record in records if record.name not in dropped], left_out


def _nothing_found(root: Path, files: Sequence[str]) -> str:
    looked_for = " ".join(sorted(EXTENSIONS))
    if not files:
        return f"{root} is empty; it should hold photos ({looked_for})"
    kinds = Counter(_suffix(name) or "no extension" for name in files).most_common(5)
    found = ", ".join(f"{count} × {kind}" for kind, count in kinds)
    return f"no photos in {root}: looked for {looked_for}, found {found}"


def _too_few(root: Path, records: Sequence[ImageRecord], left_out: Sequence[LeftOut]) -> str:
    usable = f"only {records[0].name}" if records else "none"
    lines = [f"two photos of the same scene are needed, and {usable} of those in {root} can be used"]
    lines += [f"  {entry.name}: {entry.reason}" for entry in left_out[:_SHOWN_REASONS]]
    if len(left_out) > _SHOWN_REASONS:
        lines.append(f"  and {len(left_out) - _SHOWN_REASONS} more")
    return "\n".join(lines)
