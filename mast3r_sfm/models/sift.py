"""SIFT keypoints (Lowe, 2004) by OpenCV; root of the L1-normalised histogram (Arandjelović and Zisserman, 2012).

The scale space is that of COLMAP's extractor, which takes seven times as long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import cv2
import numpy as np

from mast3r_sfm.types import Encoding, Float32, LoadedImage, Preparation

CODE_VERSION = 3
LAYERS = 3
"""Per octave."""
MIN_CONTRAST = 0.012
"""Of the whole octave: a layer's share is a third. With COLMAP's 0.02, OpenCV finds a tenth fewer keypoints than
COLMAP's extractor, and photos with little texture are lost."""
MAX_EDGE_RATIO = 10.0
DESCRIPTOR = 128


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
        text = f"sift {CODE_VERSION} {cv2.__version__} {keypoints}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._keypoints, self._threads = keypoints, threads

    def encode(self, images: Sequence[LoadedImage]) -> list[Encoding]:
        """The keypoints of each image with unit descriptors; their attention is their scale in photo pixels."""
        with _one_thread_an_image(), ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(self._encode, images))

    def _encode(self, image: LoadedImage) -> Encoding:
        detector = cv2.SIFT.create(
            nfeatures=0,
            nOctaveLayers=LAYERS,
            contrastThreshold=MIN_CONTRAST,
            edgeThreshold=MAX_EDGE_RATIO,
            enable_precise_upscale=True,
        )
        height, width = image.pixels.shape[:2]
        found, histograms = detector.detectAndCompute(cv2.cvtColor(image.pixels, cv2.COLOR_RGB2GRAY), None)
        # Where nothing is found, OpenCV has no histograms either.
        all_histograms = np.asarray(histograms if found else np.zeros((0, DESCRIPTOR)), np.float32)
        # OpenCV's pixels have their centres at whole numbers, and its sizes are diameters.
        xy = np.array([keypoint.pt for keypoint in found], np.float64).reshape(-1, 2) + 0.5
        scale = np.array([keypoint.size for keypoint in found], np.float64) / 2
        xy = image.transform.to_photo(xy)
        # One place may have several orientations, which stay in their order.
        largest = np.argsort(-scale, kind="stable")
        # The largest keypoints may all be hidden by a mask.
        if image.mask is not None:
            largest = largest[image.mask.allows(xy[largest])]
        largest = largest[: self._keypoints]
        return Encoding(
            tokens=_root(all_histograms[largest]).astype(np.float16),
            xy=xy[largest].astype(np.float32),
            attention=(scale[largest] * image.transform.scale).astype(np.float32),
            transform=image.transform,
            network_size=(width, height),
        )


def _root(histograms: Float32) -> Float32:
    """Unit vectors [K, 128] whose products compare histograms as Hellinger's kernel does."""
    root: Float32 = np.sqrt(histograms / histograms.sum(axis=1, keepdims=True).clip(min=1.0))
    return root


@contextmanager
def _one_thread_an_image() -> Iterator[None]:
    """OpenCV without threads of its own."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
