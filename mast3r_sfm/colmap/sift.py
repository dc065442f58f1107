"""COLMAP's SIFT keypoints (Lowe, 2004; root of the L1-normalised histogram, Arandjelović and Zisserman, 2012)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pycolmap
from PIL import Image

from mast3r_sfm.types import Encoding, LoadedImage, Preparation

CODE_VERSION = 1
_ALL = 1 << 20


class SiftModel:
    """Detects and describes; implements `models.base.ImageModel`."""

    name = "sift"
    images_at_once = 1
    min_similarity = 0.765
    """Cosine below which two descriptors are not a match; COLMAP's 0.7 as an angle in radians."""
    max_ratio = 0.8
    """Lowe's and COLMAP's."""

    def __init__(self, size_px: int = 1024, keypoints: int = 4096) -> None:
        """Prepare the detector.

        Args:
            size_px: long side that larger photos are shrunk to.
            keypoints: how many an image keeps, those of largest scale first.
        """
        self.preparation = Preparation(size_px=size_px)
        text = f"sift {CODE_VERSION} {pycolmap.__version__} {keypoints}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._options = _options(keypoints)
        # COLMAP knows of no masks, and the largest keypoints may all be hidden by one.
        self._unlimited = _options(_ALL)

    def encode(self, images: Sequence[LoadedImage]) -> list[Encoding]:
        """The keypoints of each image with unit descriptors; their attention is their scale in photo pixels."""
        return [self._encode_one(image) for image in images]

    def _encode_one(self, image: LoadedImage) -> Encoding:
        grey = np.asarray(Image.fromarray(image.pixels).convert("L"))
        # One extractor each, since they are not made for several threads.
        extractor = pycolmap.FeatureExtractor.create(
            self._options if image.mask is None else self._unlimited, pycolmap.Device.cpu
        )
        keypoints, descriptors = extractor.extract_from_uint8_array(grey)
        rows = [(point.x, point.y, point.compute_scale()) for point in keypoints]
        xy, scale = np.split(np.array(rows, np.float64).reshape(-1, 3), [2], axis=1)
        # COLMAP keeps whole octaves, and may give more than it was asked for.
        largest = np.argsort(-scale[:, 0], kind="stable")
        if image.mask is not None:
            largest = largest[image.mask.allows(image.transform.to_photo(xy[largest]))]
        largest = largest[: self._options.sift.max_num_features]
        xy, scale = xy[largest], scale[largest]
        tokens = np.asarray(descriptors.data, np.float32).reshape(len(rows), 128)[largest]
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True).clip(min=1.0)
        return Encoding(
            tokens=tokens.astype(np.float16),
            xy=image.transform.to_photo(xy).astype(np.float32),
            attention=(scale[:, 0] * image.transform.scale).astype(np.float32),
            transform=image.transform,
            network_size=(image.pixels.shape[1], image.pixels.shape[0]),
        )


def _options(keypoints: int) -> pycolmap.FeatureExtractionOptions:
    options = pycolmap.FeatureExtractionOptions()
    options.use_gpu = False
    options.num_threads = 1
    options.sift.max_num_features = keypoints
    return options
