"""COLMAP's SIFT keypoints (Lowe, 2004; root of the L1-normalised histogram, Arandjelović and Zisserman, 2012)."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pycolmap
from numpy.typing import NDArray
from PIL import Image

from mast3r_sfm.errors import ArtifactError
from mast3r_sfm.types import Encoding, Float64, LoadedImage, Preparation

CODE_VERSION = 2
_ALL = 1 << 20


class _Features(NamedTuple):
    """The keypoints of an image."""

    xy: Float64
    """[K, 2]."""
    scale: Float64
    """[K] pixels."""
    descriptors: NDArray[np.uint8]
    """[K, 128]."""


class SiftModel:
    """Detects and describes; implements `models.base.ImageModel`."""

    name = "sift"
    images_at_once = 16
    min_similarity = 0.765
    """Cosine below which two descriptors are not a match; COLMAP's 0.7 as an angle in radians."""
    max_ratio = 0.8
    """Lowe's and COLMAP's."""

    def __init__(self, size_px: int = 1024, keypoints: int = 4096, threads: int = 1) -> None:
        """Prepare the detector.

        Args:
            size_px: long side that larger photos are shrunk to.
            keypoints: how many an image keeps, those of largest scale first.
            threads: images that are looked at side by side.
        """
        self.preparation = Preparation(size_px=size_px)
        text = f"sift {CODE_VERSION} {pycolmap.__version__} {keypoints}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._keypoints, self._threads = keypoints, threads

    def encode(self, images: Sequence[LoadedImage]) -> list[Encoding]:
        """The keypoints of each image with unit descriptors; their attention is their scale in photo pixels."""
        encodings: dict[int, Encoding] = {}
        for is_masked in (False, True):
            mine = [number for number, image in enumerate(images) if (image.mask is not None) == is_masked]
            # COLMAP knows of no masks, and the largest keypoints may all be hidden by one.
            found = _detect([images[number] for number in mine], _ALL if is_masked else self._keypoints, self._threads)
            for number, features in zip(mine, found, strict=True):
                encodings[number] = self._encoding(images[number], features)
        return [encodings[number] for number in range(len(images))]

    def _encoding(self, image: LoadedImage, features: _Features) -> Encoding:
        # COLMAP keeps whole octaves, and may give more than it was asked for.
        largest = np.argsort(-features.scale, kind="stable")
        if image.mask is not None:
            largest = largest[image.mask.allows(image.transform.to_photo(features.xy[largest]))]
        largest = largest[: self._keypoints]
        tokens = features.descriptors[largest].astype(np.float32)
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True).clip(min=1.0)
        return Encoding(
            tokens=tokens.astype(np.float16),
            xy=image.transform.to_photo(features.xy[largest]).astype(np.float32),
            attention=(features.scale[largest] * image.transform.scale).astype(np.float32),
            transform=image.transform,
            network_size=(image.pixels.shape[1], image.pixels.shape[0]),
        )


def _detect(images: Sequence[LoadedImage], keypoints: int, threads: int) -> list[_Features]:
    """The keypoints of all images. They go through files, since only for these does pycolmap use several threads."""
    if not images:
        return []
    names = [f"{number}.pgm" for number in range(len(images))]
    with tempfile.TemporaryDirectory() as folder:
        for name, image in zip(names, images, strict=True):
            grey = np.asarray(Image.fromarray(image.pixels).convert("L"))
            height, width = grey.shape
            (Path(folder) / name).write_bytes(b"P5\n%d %d\n255\n" % (width, height) + grey.tobytes())
        path = Path(folder) / "features.db"
        pycolmap.extract_features(
            path,
            folder,
            names,
            camera_mode=pycolmap.CameraMode.PER_IMAGE,
            extraction_options=_options(keypoints, threads),
            device=pycolmap.Device.cpu,
        )
        with pycolmap.Database.open(str(path)) as database:
            return [_read_features(database, name) for name in names]


def _read_features(database: pycolmap.Database, name: str) -> _Features:
    image = database.read_image_with_name(name)
    if image is None:
        raise ArtifactError(f"SIFT cannot read back what was written to {tempfile.gettempdir()}; is there space left?")
    keypoints = np.asarray(database.read_keypoints(image.image_id), np.float64)
    # The last four numbers of a keypoint are the affine map of its frame; the scale is the mean length of its columns.
    columns = keypoints[:, 2:].reshape(-1, 2, 2)
    return _Features(
        xy=keypoints[:, :2],
        # Rounded, since one place may have several orientations, which are to stay in their order.
        scale=np.linalg.norm(columns, axis=1).mean(axis=1).round(4),
        descriptors=np.asarray(database.read_descriptors(image.image_id).data),
    )


def _options(keypoints: int, threads: int) -> pycolmap.FeatureExtractionOptions:
    options = pycolmap.FeatureExtractionOptions()
    options.use_gpu = False
    options.num_threads = threads
    options.sift.max_num_features = keypoints
    return options
