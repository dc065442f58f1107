"""MASt3R's network at its official size with random weights: its time and memory, and how much slower the plain way is.

    python benchmarks/network.py [--device D] [--dtype T] [--tf32] [--compile] [--pairs-at-once B] [--no-plain]

1. The official architecture at 512×384: milliseconds to encode an image and to decode a pair in both orders, peak
   memory. Decoding is what the match stage asks for: the descriptors of all pixels, and the points at 3,000 pixels, of
   all four views; on CUDA also the matching itself.
2. The same network with a third of the depth, 6 images and their 15 pairs, as a ratio in the same run: against the
   plain way (float32, one pair at a time, explicit attention matrices, both images encoded again for each pair, one
   order after the other, whole pointmaps). Both must give the same.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mast3r_sfm.matching.putative import match_dense
from mast3r_sfm.models.mast3r.architecture import Architecture
from mast3r_sfm.models.mast3r.checkpoint import Checkpoint
from mast3r_sfm.models.mast3r.model import Mast3rModel, Precision
from mast3r_sfm.models.mast3r.network import Network
from mast3r_sfm.models.registry import resolve_device, resolve_dtype
from mast3r_sfm.storage.encodings import pack
from mast3r_sfm.types import Encoding, ImageRecord, LoadedImage, PairPrediction, PixelTransform, ViewPrediction

WIDTH, HEIGHT = 512, 384
SAMPLED = 3000
IMAGES = 6

Views = list[tuple[Tensor, Tensor]]
"""Descriptors [H·W, D] and points [H·W, 3] or at the sampled pixels, of the four views of a pair's two orders."""


def random_checkpoint(architecture: Architecture) -> Checkpoint:
    """Weights as torch initialises them."""
    torch.manual_seed(0)
    return Checkpoint(architecture=architecture, tensors=Network(architecture).state_dict(), sha256="0" * 64)


def random_images(count: int) -> list[LoadedImage]:
    """Noise of the right size."""
    generator = np.random.default_rng(0)
    transform = PixelTransform(matrix=np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    return [
        LoadedImage(
            record=ImageRecord(name=f"{number}.jpg", width_px=WIDTH, height_px=HEIGHT, sha256=""),
            pixels=generator.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8),
            transform=transform,
        )
        for number in range(count)
    ]


def views_of(forward: PairPrediction, backward: PairPrediction) -> list[ViewPrediction]:
    """All four."""
    return [forward.first, forward.second, backward.first, backward.second]


class Plain:
    """The network, computed as its papers draw it; slow, and short enough to be read against them."""

    def __init__(self, architecture: Architecture, tensors: dict[str, Tensor], device: torch.device) -> None:
        self.arch, self.t = architecture, {name: tensor.to(device) for name, tensor in tensors.items()}

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.t[f"{name}.weight"], self.t[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.t[f"{name}.weight"], self.t[f"{name}.bias"], 1e-6)

    def _conv(self, name: str, x: Tensor, **options: Any) -> Tensor:
        return functional.conv2d(x, self.t[f"{name}.weight"], self.t.get(f"{name}.bias"), **options)

    def _rope(self, x: Tensor) -> Tensor:
        """Turn [heads, T, D] by row and by column."""
        half = x.shape[-1] // 2
        frequency = self.arch.rope_base ** (-torch.arange(0, half, 2, device=x.device) / half)
        places = torch.cartesian_prod(torch.arange(HEIGHT // 16), torch.arange(WIDTH // 16)).to(x.device)
        parts = []
        for axis, part in enumerate(x.split(half, dim=-1)):
            angle = (places[:, axis, None] * frequency).repeat(1, 2)
            one, other = part.chunk(2, dim=-1)
            parts.append(part * angle.cos() + torch.cat([-other, one], dim=-1) * angle.sin())
        return torch.cat(parts, dim=-1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        """[1, T, C] three times, with the whole matrix of attention in memory."""
        q, k, v = (x[0].view(x.shape[1], heads, -1).transpose(0, 1) for x in (q, k, v))
        q, k = self._rope(q), self._rope(k)
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return (weights @ v).transpose(0, 1).flatten(1)[None]

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        return self._linear(f"{name}.fc2", functional.gelu(self._linear(f"{name}.fc1", x)))

    def _self_attention(self, name: str, x: Tensor, heads: int) -> Tensor:
        return self._linear(f"{name}.proj", self._attend(*self._linear(f"{name}.qkv", x).chunk(3, dim=-1), heads))

    def _encode(self, image: Tensor) -> Tensor:
        x = self._conv("patch_embed.proj", image, stride=16).flatten(2).transpose(1, 2)
        for i in range(self.arch.encoder_depth):
            b = f"enc_blocks.{i}"
            x = x + self._self_attention(f"{b}.attn", self._norm(f"{b}.norm1", x), self.arch.encoder_heads)
            x = x + self._mlp(f"{b}.mlp", self._norm(f"{b}.norm2", x))
        return self._norm("enc_norm", x)

    def _block(self, b: str, x: Tensor, y: Tensor) -> Tensor:
        heads = self.arch.decoder_heads
        x = x + self._self_attention(f"{b}.attn", self._norm(f"{b}.norm1", x), heads)
        query, other = self._norm(f"{b}.norm2", x), self._norm(f"{b}.norm_y", y)
        q, k, v = (self._linear(f"{b}.cross_attn.proj{n}", z) for n, z in (("q", query), ("k", other), ("v", other)))
        x = x + self._linear(f"{b}.cross_attn.proj", self._attend(q, k, v, heads))
        return x + self._mlp(f"{b}.mlp", self._norm(f"{b}.norm3", x))

    def _order(self, one: Tensor, two: Tensor) -> Views:
        """Decode one order of a pair from its two images' tokens."""
        outputs = [[one], [two]]
        x, y = self._linear("decoder_embed", one), self._linear("decoder_embed", two)
        for i in range(self.arch.decoder_depth):
            x, y = self._block(f"dec_blocks.{i}", x, y), self._block(f"dec_blocks2.{i}", y, x)
            outputs[0].append(x)
            outputs[1].append(y)
        for stored in outputs:
            stored[-1] = self._norm("dec_norm", stored[-1])
        return [self._head(f"downstream_head{v + 1}", outputs[v]) for v in range(2)]

    def _head(self, h: str, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        grid = (HEIGHT // 16, WIDTH // 16)
        both = torch.cat([outputs[0], outputs[-1]], dim=-1)
        local = self._mlp(f"{h}.head_local_features", both).transpose(1, 2).unflatten(2, grid)
        features = functional.pixel_shuffle(local, 16)[0].permute(1, 2, 0).flatten(0, 1)
        raw = self._dpt(f"{h}.dpt", [outputs[i].transpose(1, 2).unflatten(2, grid) for i in self.arch.dpt_hooks])
        xyz = raw[0].permute(1, 2, 0).flatten(0, 1)[:, :3]
        distance = xyz.norm(dim=-1, keepdim=True)
        return functional.normalize(features[:, :-1], dim=-1), xyz / distance * distance.expm1()

    def _dpt(self, d: str, maps: list[Tensor]) -> Tensor:
        levels = [self._conv(f"{d}.act_postprocess.{i}.0", x) for i, x in enumerate(maps)]
        for i, stride in ((0, 4), (1, 2)):
            a = f"{d}.act_postprocess.{i}.1"
            levels[i] = functional.conv_transpose2d(levels[i], self.t[f"{a}.weight"], self.t[f"{a}.bias"], stride)
        levels[3] = self._conv(f"{d}.act_postprocess.3.1", levels[3], stride=2, padding=1)
        path: Tensor | None = None
        for i in range(4, 0, -1):
            level, r = self._conv(f"{d}.scratch.layer{i}_rn", levels[i - 1], padding=1), f"{d}.scratch.refinenet{i}"
            path = level if path is None else path + self._residual(f"{r}.resConfUnit1", level)
            path = self._conv(f"{r}.out_conv", self._double(self._residual(f"{r}.resConfUnit2", path)))
        assert path is not None
        path = self._double(self._conv(f"{d}.head.0", path, padding=1))
        return self._conv(f"{d}.head.4", self._conv(f"{d}.head.2", path, padding=1).relu())

    def _residual(self, name: str, x: Tensor) -> Tensor:
        inner = self._conv(f"{name}.conv1", x.relu(), padding=1).relu()
        return x + self._conv(f"{name}.conv2", inner, padding=1)

    def _double(self, x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    @torch.inference_mode()
    def pair(self, first: LoadedImage, second: LoadedImage) -> Views:
        """Everything of a pair from its two photos."""
        device = self.t["mask_token"].device
        images = [torch.from_numpy(image.pixels).to(device).permute(2, 0, 1)[None] for image in (first, second)]
        one, two = (self._encode((image.float() / 255 - 0.5) / 0.5) for image in images)
        return self._order(one, two) + self._order(two, one)


class Clock:
    """Seconds of a piece of work, the device's queue emptied before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Do it, and say how long it took."""
        self._wait()
        start = time.perf_counter()
        result = work()
        self._wait()
        return time.perf_counter() - start, result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def read(prediction: Sequence[PairPrediction], index: Tensor) -> Views:
    """What the match stage asks a prediction for."""
    return [(view.descriptors.flatten(0, 1), view.points_at(index)[0]) for view in views_of(*prediction)]


def peak_mb(device: torch.device) -> float:
    """Most memory held so far, on the device or, for a CPU, by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def official(options: argparse.Namespace, device: torch.device, index: Tensor) -> dict[str, Any]:
    """Times and memory at the official size."""
    model = make(Architecture(), options, device)
    clock, images = Clock(device), random_images(max(model.images_at_once, model.pairs_at_once + 1))
    batch = images[: model.images_at_once]
    model.encode(batch)  # the first call chooses kernels, and compiles where that was asked for
    encode_seconds = min(clock(lambda: model.encode(batch))[0] for _ in range(3)) / len(batch)
    encodings = model.encode(images)
    pairs = [(encodings[0], encoding) for encoding in encodings[1:]][: model.pairs_at_once]

    def decode() -> None:
        for number, *orders in model.predict(pairs):
            if device.type == "cuda":
                matches = match_dense((orders[0], orders[1]), *pairs[number])
                assert matches.points is not None
                matches.points(np.arange(min(SAMPLED, len(matches.xy_first))))
            else:
                read(orders, index)

    decode()
    decode_seconds = min(clock(decode)[0] for _ in range(3)) / len(pairs)
    peak = peak_mb(device)
    encode_flops, pair_flops = count_flops(Architecture())
    if options.profile:
        profile(decode, device)
    return {
        "encode_ms": 1000 * encode_seconds,
        "pair_ms": 1000 * decode_seconds,
        "pairs_per_second": 1 / decode_seconds,
        "pairs_at_once": len(pairs),
        "peak_mb": peak,
        "encode_tflop": encode_flops / 1e12,
        "pair_tflop": pair_flops / 1e12,
        "pair_tflop_per_second": pair_flops / 1e12 / decode_seconds,
        "tokens_gb_per_1000_images": stored_bytes(encodings) / len(encodings) / 1e6,
    }


def stored_bytes(encodings: Sequence[Encoding]) -> int:
    """Of a chunk on disk."""
    return sum(array.nbytes for array in pack(encodings)[0].values())


def count_flops(architecture: Architecture) -> tuple[float, float]:
    """Of encoding an image, and of decoding a pair in both orders; products, convolutions and attention are counted."""
    grid = (HEIGHT // 16, WIDTH // 16)
    with torch.device("meta"), torch.inference_mode():
        network = Network(architecture)
        with FlopCounterMode(display=False) as encoding:
            tokens = network.encode(torch.zeros(1, 3, HEIGHT, WIDTH))
        with FlopCounterMode(display=False) as decoding:
            for head, view in zip(network.heads, network.decode(tokens, tokens, (grid, grid)), strict=True):
                hooks = [view[hook] for hook in head.hooks]
                head.descriptors(hooks, grid)
                head.points_at(head.features(hooks, grid)[0], torch.zeros(SAMPLED, dtype=torch.int64))
    return float(encoding.get_total_flops()), 2.0 * decoding.get_total_flops()


def profile(work: Callable[[], Any], device: torch.device) -> None:
    """Print where the time goes."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        key = "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        work()
    print(profiler.key_averages().table(sort_by=key, row_limit=25))


def against_plain(options: argparse.Namespace, device: torch.device, index: Tensor) -> dict[str, Any]:
    """Seconds for 6 images and 15 pairs, ours and plainly, and by how much the results differ."""
    architecture = Architecture(encoder_depth=8, decoder_depth=4)
    model, images = make(architecture, options, device), random_images(IMAGES)
    plain = Plain(architecture, random_checkpoint(architecture).tensors, device)
    numbers, clock = list(combinations(range(IMAGES), 2)), Clock(device)
    ours: dict[int, Views] = {}

    def run_ours() -> None:
        encodings = model.encode(images)
        pairs = [(encodings[i], encodings[j]) for i, j in numbers]
        for start in range(0, len(pairs), model.pairs_at_once):
            for number, *orders in model.predict(pairs[start : start + model.pairs_at_once]):
                views = read(orders, index)
                ours[start + number] = [(descriptors[index].clone(), points) for descriptors, points in views]

    if device.type == "cuda" or options.compile:
        run_ours()
        plain.pair(images[0], images[1])
    seconds, _ = clock(run_ours)
    plain_seconds, angle, distance = 0.0, 0.0, 0.0
    for number, (i, j) in enumerate(numbers):
        spent, expected = clock(lambda i=i, j=j: plain.pair(images[i], images[j]))
        plain_seconds += spent
        for (descriptors, points), (true_descriptors, true_points) in zip(ours[number], expected, strict=True):
            angle = max(angle, float((descriptors - true_descriptors[index]).norm(dim=1).max()))
            error = (points - true_points[index]).norm(dim=1) / true_points[index].norm(dim=1)
            distance = max(distance, float(error.max()))
    return {
        "plain_seconds": plain_seconds,
        "ours_seconds": seconds,
        "ratio_plain_to_ours": plain_seconds / seconds,
        "largest_descriptor_difference": angle,
        "largest_point_difference": distance,
    }


def make(architecture: Architecture, options: argparse.Namespace, device: torch.device) -> Mast3rModel:
    """The model as `reconstruct` loads it."""
    precision = Precision(decoder=resolve_dtype(options.dtype, device), tf32=options.tf32)
    model = Mast3rModel(random_checkpoint(architecture), device, precision=precision, compiled=options.compile)
    model.pairs_at_once = options.pairs_at_once or model.pairs_at_once
    return model


def main(arguments: Sequence[str]) -> None:
    """Run both parts and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--pairs-at-once", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-plain", action="store_true", help="The first part only.")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    index = torch.randperm(WIDTH * HEIGHT, generator=torch.Generator().manual_seed(0))[:SAMPLED].to(device)
    figures = official(options, device, index)
    if not options.no_plain:
        figures |= against_plain(options, device, index)
    for name, value in figures.items():
        print(f"{name:32}{value:12.4g}")
    common.print_json(figures | {"device": str(device), "dtype": options.dtype})


if __name__ == "__main__":
    main(sys.argv[1:])
