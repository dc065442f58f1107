"""MASt3R and DUSt3R as models of the chain: batches, half precision, memory; implements `models.base.DenseModel`."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from mast3r_sfm.config import fingerprint
from mast3r_sfm.errors import ConfigError, WeightsError
from mast3r_sfm.models.mast3r.checkpoint import Checkpoint
from mast3r_sfm.models.mast3r.dpt import Grid
from mast3r_sfm.models.mast3r.network import Head, Points, build_network
from mast3r_sfm.types import Encoding, LoadedImage, PairPrediction, Preparation, ViewPrediction

CODE_VERSION = 1
SQUARE_SIZE_PX = 224
"""Networks of this size were trained on squares."""
_MAX_PAIRS, _MAX_IMAGES = 8, 16
"""More at once is not faster."""
_BYTES_PER_PIXEL = 1500
"""Memory that decoding a pair in both orders takes, per pixel of one view: 400 of descriptors, 200 of tokens that the
heads read, and what the blocks of the decoder and the heads need in passing, by their shapes; with a margin."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How a network computes."""

    decoder: torch.dtype = torch.float32
    """Of the decoder, which does most of the work: float32, float16 or bfloat16."""
    tf32: bool = False
    """Whether float32 products may be rounded to TF32 on CUDA."""


class Mast3rModel:
    """A MASt3R or DUSt3R network; may be shared by threads, of which one at a time computes."""

    retrieval_tokens = 300

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        precision: Precision | None = None,
        compiled: bool = False,
        max_size_px: int = 0,
    ) -> None:
        """Build the network on a device.

        Args:
            checkpoint: its weights and architecture.
            device: where it runs.
            precision: how it computes; all in float32 by default.
            compiled: let torch.compile fuse the blocks, which takes a minute at first use and needs a C++ compiler.
            max_size_px: long side of the images; 0 = what the network was trained with.

        Raises:
            WeightsError: the weights do not fit the architecture.
        """
        architecture = checkpoint.architecture
        precision = precision or Precision()
        self.name = "mast3r" if architecture.descriptor_channels else "dust3r"
        self.fingerprint = fingerprint(self.name, CODE_VERSION, checkpoint.sha256)
        size_px = max_size_px or architecture.image_size_px
        self.preparation = Preparation(
            size_px=size_px,
            patch_px=architecture.patch_px,
            square_crop=architecture.image_size_px == size_px == SQUARE_SIZE_PX,
        )
        self.token_channels = architecture.encoder_width
        self._architecture = architecture
        self._device = device
        self._precision = precision
        self._computing = threading.RLock()
        self._network = build_network(architecture, checkpoint.tensors)
        self._network.decoder_to(precision.decoder)
        self._network.to(device)
        on_cpu = device.type == "cpu"
        self._compiler_errors: tuple[type[Exception], ...] = ()
        if compiled:
            # A second or more to import, for those who ask for it.
            from torch._dynamo.exc import TorchDynamoException

            self._compiler_errors = (TorchDynamoException,)
            self._network.compile_blocks()
        elif on_cpu and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            self._network.pack_for_cpu()
        self.images_at_once = 2 if on_cpu else _MAX_IMAGES
        self.pairs_at_once = 1 if on_cpu else self._pairs_that_fit()

    def encode(self, images: Sequence[LoadedImage]) -> list[Encoding]:
        """Tokens of images, those of one shape together.

        Raises:
            WeightsError: the network gives NaN.
            ConfigError: not even one image fits into the device's memory.
        """
        encodings: dict[int, Encoding] = {}
        for numbers in _grouped([image.pixels.shape for image in images]):
            for number, encoding in zip(
                numbers,
                self._in_batches([images[number] for number in numbers], "images_at_once", self._encode_alike),
                strict=True,
            ):
                encodings[number] = encoding
        return [encodings[number] for number in range(len(images))]

    def predict(
        self, pairs: Sequence[tuple[Encoding, Encoding]]
    ) -> Iterator[tuple[int, PairPrediction, PairPrediction]]:
        """Decode pairs in both orders, those of the same shapes together; see `DenseModel.predict`.

        Raises:
            WeightsError: the network gives NaN.
            ConfigError: not even one pair fits into the device's memory.
        """
        for numbers in _grouped([(first.network_size, second.network_size) for first, second in pairs]):
            orders = self._in_batches([pairs[number] for number in numbers], "pairs_at_once", self._decode_alike)
            for number, (forward, backward) in zip(numbers, orders, strict=True):
                yield number, forward, backward

    def _in_batches(
        self,
        items: Sequence[Item],
        size: Literal["images_at_once", "pairs_at_once"],
        run: Callable[[Sequence[Item]], list[Result]],
    ) -> Iterator[Result]:
        """Run batch by batch; one that does not fit into the memory is halved, and so are all from then on."""
        start = 0
        while start < len(items):
            batch = items[start : start + getattr(self, size)]
            results = None
            try:
                with self._computing, torch.inference_mode(), _products(self._device, tf32=self._precision.tf32):
                    results = run(batch)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise ConfigError(
                        f"{self._device} has too little free memory for {self.name}: free some, set a smaller "
                        "encode.max_size_px, or take --device cpu"
                    ) from error
            except self._compiler_errors as error:
                reason = str(error).partition("\n")[0]
                raise ConfigError(
                    f"--compile: torch cannot compile the network on this machine ({reason}); install a C++ compiler, "
                    "or leave --compile out"
                ) from error
            if results is None:
                # Only here, with the exception gone, is what the failed batch had allocated free again.
                setattr(self, size, len(batch) // 2)
                gc.collect()
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            yield from results
            start += len(batch)

    def _encode_alike(self, images: Sequence[LoadedImage]) -> list[Encoding]:
        pixels = torch.from_numpy(np.stack([image.pixels for image in images])).to(self._device)
        tokens = self._network.encode((pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)
        halved = tokens.half()
        self._check_finite([], [halved])
        attention = tokens.norm(dim=2).cpu().numpy()
        stored = halved.cpu().numpy()
        return [
            Encoding(
                tokens=stored[number],
                xy=self._patch_centres(image),
                attention=attention[number],
                transform=image.transform,
                network_size=(image.pixels.shape[1], image.pixels.shape[0]),
            )
            for number, image in enumerate(images)
        ]

    def _patch_centres(self, image: LoadedImage) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        patch = self._architecture.patch_px
        rows, columns = image.pixels.shape[0] // patch, image.pixels.shape[1] // patch
        row, column = np.divmod(np.arange(rows * columns), columns)
        centres = image.transform.to_photo(patch * (np.stack([column, row], axis=1) + 0.5))
        return centres.astype(np.float32)

    def _decode_alike(self, pairs: Sequence[tuple[Encoding, Encoding]]) -> list[tuple[PairPrediction, PairPrediction]]:
        first = self._tokens([pair[0] for pair in pairs])
        second = self._tokens([pair[1] for pair in pairs])
        grids = self._grid(pairs[0][0]), self._grid(pairs[0][1])
        count = len(pairs)
        if grids[0] == grids[1]:
            # Both orders are one batch of twice the size.
            both = self._predict(torch.cat([first, second]), torch.cat([second, first]), grids)
            return list(zip(both[:count], both[count:], strict=True))
        forward = self._predict(first, second, grids)
        return list(zip(forward, self._predict(second, first, grids[::-1]), strict=True))

    def _predict(self, first: Tensor, second: Tensor, grids: tuple[Grid, Grid]) -> list[PairPrediction]:
        outputs = self._network.decode(first, second, grids)
        views = [
            self._views(head, view, grid) for head, view, grid in zip(self._network.heads, outputs, grids, strict=True)
        ]
        results = [(view.descriptors, view.descriptor_confidence) for view in views[0] + views[1]]
        self._check_finite([output[-1] for output in outputs], [values for pair in results for values in pair])
        euclidean = not self._architecture.descriptor_channels
        return [
            PairPrediction(first=one, second=two, euclidean=euclidean)
            for one, two in zip(views[0], views[1], strict=True)
        ]

    def _views(self, head: Head, outputs: list[Tensor], grid: Grid) -> list[ViewPrediction]:
        """The predictions of one view of each pair of a batch."""
        views = []
        for number in range(len(outputs[0])):
            mine = [outputs[hook][number : number + 1] for hook in head.hooks]
            if self._architecture.descriptor_channels:
                values, confidence = head.descriptors(mine, grid)
                points_at = partial(self._points_at, head, mine, grid)
            else:
                # DUSt3R: pixels that show the same point have the same coordinates in the first view's frame.
                values, confidence = head.points(head.features(mine, grid))
                points_at = partial(_pick, Points(values[0].flatten(0, 1), confidence[0].flatten()))
            views.append(
                ViewPrediction(descriptors=values[0], descriptor_confidence=confidence[0], points_at=points_at)
            )
        return views

    def _points_at(self, head: Head, outputs: list[Tensor], grid: Grid, index: Tensor) -> Points:
        """Points of one view of one pair, whose tokens are kept instead of its pointmap."""

        def run(items: Sequence[Tensor]) -> list[Points]:
            points = [head.points_at(head.features(outputs, grid)[0], item) for item in items]
            self._check_finite([], [values for some in points for values in some])
            return points

        (points,) = self._in_batches([index], "pairs_at_once", run)
        return points

    def _tokens(self, encodings: Sequence[Encoding]) -> Tensor:
        stacked = torch.from_numpy(np.stack([encoding.tokens for encoding in encodings]))
        return stacked.to(self._device).float()

    def _grid(self, encoding: Encoding) -> Grid:
        width, height = encoding.network_size
        return height // self._architecture.patch_px, width // self._architecture.patch_px

    def _check_finite(self, decoded: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """What came out of the decoder, and what was computed in float32, before or after it."""
        if _all_finite([*decoded, *results]):
            return
        dtype = self._precision.decoder
        overflow = dtype != torch.float32 and decoded and not _all_finite(decoded)
        advice = f"{dtype} overflows; take --dtype float32" if overflow else "the weights are broken"
        raise WeightsError(f"{self.name} gives NaN or infinite values: {advice}")

    def _pairs_that_fit(self) -> int:
        if self._device.type != "cuda":
            return 1
        free, _ = torch.cuda.mem_get_info(self._device)
        pixels = self.preparation.size_px**2 * 3 // 4
        return max(1, min(_MAX_PAIRS, int(0.8 * free) // (_BYTES_PER_PIXEL * pixels)))


def _grouped(keys: Sequence[object]) -> list[list[int]]:
    """Numbers of equal keys together, in the order in which the keys first appear."""
    groups: dict[object, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _all_finite(values: Sequence[Tensor]) -> bool:
    # Asked at once: each question waits for the device.
    return bool(torch.stack([torch.isfinite(some).all() for some in values]).all())


def _pick(points: Points, index: Tensor) -> Points:
    return Points(points.xyz[index], points.confidence[index])


@contextmanager
def _products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Whether float32 products on CUDA may be rounded to TF32; torch only has a switch for the whole process."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
