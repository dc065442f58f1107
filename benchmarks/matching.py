"""Reciprocal matching of two dense maps, fast against plain, in one run; both must find the same.

    python benchmarks/matching.py [--kind K …] [--threads 2] [--repeats 2] [--step 8] [--exhaustive]

Two maps of 512×384 descriptors with 24 dimensions, seeds every 8 pixels of the first, as published: up to 10 round
trips of nearest neighbours, prepared maps included in the time. The ratios are those of

- plain: float32 products of blocks of 8,192 descriptors with 8,192, of which both row and column maxima are taken each
  time, as published; and
- rows: row maxima only, in products that stay in the cache, which is as fast as a full comparison gets in torch.

All three share the same iteration, in which seeds that meet go on as one, and take turns. With --exhaustive, the
exhaustive float64 search of the library is compared as well. Descriptors are rounded to multiples of 1/2,048, about as
half precision does: float32 sums of their products are exact in any order, so that near ties cannot part the searches.

Kinds of maps:

- smooth: random Fourier features of a surface with relief and steps, seen from two places.
- noisy: the same with noise on every pixel of both maps, so that the median product of nearest neighbours is 0.98.
- rough: with twice the noise, 0.94.
- oracle: descriptors of `synthetic.oracle` for two rendered views, with a noise of one pixel.
- random: nothing is smooth; the worst that can happen to bounds.
- tied: four different descriptors, scattered.
- constant: all pixels are equally near to each other.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

from mast3r_sfm.matching import blocks
from mast3r_sfm.matching.blocks import DescriptorMap
from mast3r_sfm.matching.exhaustive import PlainMap, score_pairs
from mast3r_sfm.matching.reciprocal import PixelPairs, SearchableMap, find_reciprocal, grid_seeds, match_predictions
from mast3r_sfm.synthetic.oracle import OracleModel, OracleNoise
from mast3r_sfm.synthetic.render import make_views
from mast3r_sfm.types import ImageRecord, LoadedImage, PairPrediction, PixelTransform, ViewPrediction

HEIGHT, WIDTH, CHANNELS = 384, 512, 24
PUBLISHED_BLOCK = 8192
CACHED_ROWS = 128
BAR = 20.0
NOISE = {"smooth": 0.0, "noisy": 0.2, "rough": 0.4}
JUDGED = ("smooth", "noisy", "oracle")
"""Kinds that the bar is meant for."""
DEFAULT = (*JUDGED, "random")
KINDS = (*NOISE, "oracle", "random", "tied", "constant")
FAST_RUNS = 5
"""Of the fast search before each other one, which takes as long as many of them."""

Maps = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class PublishedMap:
    """Searched as published: blocks of products, row and column maxima of each."""

    size: tuple[int, int]
    features: Tensor

    @classmethod
    def build(cls, descriptors: Tensor) -> PublishedMap:
        """From a map [H, W, D]."""
        return cls(size=(descriptors.shape[0], descriptors.shape[1]), features=descriptors.flatten(0, 1))

    def nearest(self, queries: Tensor, guess: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """[Q] pixels; the nearest query of each pixel is found, too, and not needed."""
        row_best = torch.full((len(queries),), -torch.inf)
        column_best = torch.full((len(self.features),), -torch.inf)
        row, column = torch.zeros(len(queries), dtype=torch.int64), torch.zeros(len(self.features), dtype=torch.int64)
        for top in range(0, len(queries), PUBLISHED_BLOCK):
            for left in range(0, len(self.features), PUBLISHED_BLOCK):
                rows, columns = slice(top, top + PUBLISHED_BLOCK), slice(left, left + PUBLISHED_BLOCK)
                products = queries[rows] @ self.features[columns].T
                keep_better(row_best[rows], row[rows], *products.max(dim=1), left)
                keep_better(column_best[columns], column[columns], *products.max(dim=0), top)
        return row


@dataclass(frozen=True, kw_only=True)
class RowsMap(PublishedMap):
    """Searched with row maxima only, in products that stay in the cache."""

    def nearest(self, queries: Tensor, guess: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """[Q] pixels."""
        best, index = torch.full((len(queries),), -torch.inf), torch.zeros(len(queries), dtype=torch.int64)
        for left in range(0, len(self.features), PUBLISHED_BLOCK):
            columns = self.features[left : left + PUBLISHED_BLOCK].T
            for top in range(0, len(queries), CACHED_ROWS):
                rows = slice(top, top + CACHED_ROWS)
                keep_better(best[rows], index[rows], *(queries[rows] @ columns).max(dim=1), left)
        return index


def keep_better(best: Tensor, index: Tensor, value: Tensor, place: Tensor, start: int) -> None:
    """Replace, in place, what is not as good as the maxima of a block that starts at `start`."""
    better = value > best
    best[better] = value[better]
    index[better] = place[better] + start


def surface_maps(noise: float) -> Maps:
    """Random Fourier features of a surface that two cameras see, moved, turned and scaled; noise of some norm."""
    rng = np.random.default_rng(0)
    y, x = np.meshgrid(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5, indexing="ij")
    lengths = np.geomspace(8, WIDTH, CHANNELS // 2)
    frequencies = rng.standard_normal((3, CHANNELS // 2)) / lengths

    def describe(x: Any, y: Any) -> Tensor:
        steps = 30 * ((x // 128 + y // 96) % 2)
        z = 20 * np.sin(x / 70) + 15 * np.cos(y / 55 + x / 90) + steps
        phase = np.stack([x, y, z], axis=-1) @ frequencies
        features = np.concatenate([np.cos(phase), np.sin(phase)], axis=-1) / np.sqrt(CHANNELS / 2)
        features += noise / np.sqrt(CHANNELS) * rng.standard_normal(features.shape)
        features /= np.linalg.norm(features, axis=-1, keepdims=True)
        return torch.from_numpy(features.astype(np.float32))

    right, down = x - WIDTH / 2, y - HEIGHT / 2
    moved_x = 1.08 * (np.cos(0.15) * right - np.sin(0.15) * down) + WIDTH / 2 + 25 + 0.00025 * right * down
    moved_y = 1.08 * (np.sin(0.15) * right + np.cos(0.15) * down) + HEIGHT / 2 - 10
    return describe(x, y), describe(moved_x, moved_y + 12 * np.sin(moved_x / 80))


def oracle_maps() -> Maps:
    """What the oracle predicts for two neighbouring views of a rendered façade."""
    views = make_views("facade", 3, width_px=WIDTH, height_px=HEIGHT, samples=1)
    model = OracleModel(views, OracleNoise(pixel_px=1.0))
    images = [
        LoadedImage(
            record=ImageRecord(name=name, width_px=WIDTH, height_px=HEIGHT, sha256=""),
            pixels=views[name].image,
            transform=PixelTransform(matrix=np.eye(2, 3)),
        )
        for name in list(views)[:2]
    ]
    first, second = model.encode(images)
    ((_, forward, _),) = model.predict([(first, second)])
    return forward.first.descriptors, forward.second.descriptors


def make_maps(kind: str) -> Maps:
    """The two maps of a kind, rounded."""
    if kind in NOISE:
        first, second = surface_maps(NOISE[kind])
    else:
        first, second = oracle_maps() if kind == "oracle" else scattered_maps(kind)
    return (2048 * first).round() / 2048, (2048 * second).round() / 2048


def scattered_maps(kind: str) -> Maps:
    """Unit vectors without order: all different, of four kinds, or of one."""
    generator = torch.Generator().manual_seed(0)
    many = {"random": 2 * HEIGHT * WIDTH, "tied": 4, "constant": 1}[kind]
    table = torch.nn.functional.normalize(torch.randn(many, CHANNELS, generator=generator), dim=1)
    pick = torch.randint(many, (2, HEIGHT, WIDTH), generator=generator)
    if kind == "random":
        pick = torch.arange(many).view(2, HEIGHT, WIDTH)
    return table[pick[0]], table[pick[1]]


def match(build: Callable[[Tensor], SearchableMap], maps: Maps, step: int) -> PixelPairs:
    """Everything that is timed."""
    first, second = build(maps[0]), build(maps[1])
    return find_reciprocal(first, second, grid_seeds(first.size, step)).pairs


def best_of(repeats: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest run, and the result."""
    seconds, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, result


def side_by_side(maps: Maps, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, PixelPairs]]:
    """Seconds of the fastest run of each search, and its matches; in turns, so that all see the same machine."""
    builds: dict[str, Callable[[Tensor], SearchableMap]] = {
        "fast": DescriptorMap.build,
        "plain": PublishedMap.build,
        "rows": RowsMap.build,
    }
    seconds, found = dict.fromkeys(builds, float("inf")), {}
    for _ in range(options.repeats):
        for name, build in builds.items():
            spent, found[name] = best_of(FAST_RUNS if name == "fast" else 1, partial(match, build, maps, options.step))
            seconds[name] = min(seconds[name], spent)
    return seconds, found


def phases(maps: Maps, step: int) -> dict[str, float]:
    """Milliseconds in the functions of the fast search, what they call included."""
    with cProfile.Profile() as profile:
        match(DescriptorMap.build, maps, step)
    names = {
        "build": "build",
        "_lower": "first guess",
        "left": "bounds",
        "_compare": "blocks left",
        "_compare_all": "whole products",
        "_decide": "decide",
        "nearest_exhaustive": "exhaustive",
    }
    found = dict.fromkeys(names.values(), 0.0)
    for (file, _, name), row in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if name in names and Path(file).stem in (Path(blocks.__file__).stem, "exhaustive"):
            found[names[name]] += 1000 * row[3]
    return found


def share_left(maps: Maps, step: int) -> tuple[float, float]:
    """Share of the blocks that bounds leave per seed once the nearest pixel is known; and on the way back, when the
    seed's own pixel is the guess."""
    first, second = (DescriptorMap.build(one, bounded=True) for one in maps)
    seeds = grid_seeds(first.size, step)
    there = second.nearest(first.features[seeds])
    shares = []
    for source, target, query, guess in ((first, second, seeds, there), (second, first, there, seeds)):
        queries = source.features[query]
        lower = score_pairs(queries, target.features[guess], euclidean=False).float() - 1e-5
        assert target.bounds is not None
        left = target.bounds.left(slice(None), target.bounds.of_queries(queries, queries.norm(dim=1), lower))
        shares.append(float(left.float().mean()))
    return shares[0], shares[1]


def disagreements(found: PixelPairs, other: PixelPairs) -> int:
    """Matches that only one of two searches found."""
    one, two = (set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) for pairs in (found, other))
    return len(one ^ two)


def both_decodes(maps: Maps) -> float:
    """Seconds for what the match stage does with a pair, both ways on both decodes (here the same maps twice)."""
    views = [
        ViewPrediction(
            descriptors=one,
            descriptor_confidence=torch.ones(one.shape[:2]),
            points_at=lambda index: (index, index),
        )
        for one in maps
    ]
    forward = PairPrediction(first=views[0], second=views[1])
    backward = PairPrediction(first=views[1], second=views[0])
    return best_of(2, lambda: match_predictions(forward, backward, 8))[0]


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one kind of maps."""
    maps = make_maps(kind)
    seconds, found = side_by_side(maps, options)
    figures: dict[str, Any] = {
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "ratio": seconds["plain"] / seconds["fast"],
        "ratio_rows": seconds["rows"] / seconds["fast"],
        "matches": len(found["fast"]),
        "unlike_plain": disagreements(found["fast"], found["plain"]),
        "unlike_rows": disagreements(found["fast"], found["rows"]),
        "both_decodes_seconds": both_decodes(maps),
    }
    figures["left"], figures["left_on_return"] = share_left(maps, options.step)
    if options.exhaustive:
        figures["exhaustive_seconds"], truth = best_of(1, lambda: match(PlainMap.build, maps, options.step))
        figures["unlike_exhaustive"] = disagreements(found["fast"], truth)
    print(f"{kind}: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in phases(maps, options.step).items() if ms > 0.5))
    return figures


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=DEFAULT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--step", type=int, default=8)
    parser.add_argument("--exhaustive", action="store_true", help="Compare with the float64 search, a minute a kind.")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found = {kind: measure(kind, options) for kind in options.kind}
    columns = list(next(iter(found.values())))
    print()
    common.print_table(["", *found], [[column, *(figures[column] for figures in found.values())] for column in columns])
    judged = [found[kind] for kind in JUDGED if kind in found]
    for kind, figures in found.items():
        unlike = {name: count for name, count in figures.items() if name.startswith("unlike") and count}
        assert not unlike, f"{kind}: not the same matches: {unlike}"
    common.print_json(
        {f"ratio_{kind}": round(figures["ratio"], 1) for kind, figures in found.items()}
        | {"ratio_lowest": round(min(figures["ratio"] for figures in judged), 1) if judged else None, "bar": BAR}
        | {"threads": options.threads, "kinds": found}
    )


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch is loaded, so too late now. Threads that spin while they wait, as they do otherwise, make all
        # searches, and ours most, ten times as slow as soon as another process wants a core.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    main(sys.argv[1:])
