"""The pairs stage on made-up places: 1,000 and 10,000 images, and its scores against plain ASMK in the same run.

    python benchmarks/retrieval.py [--images 1000 10000] [--dimension 64] [--threads 2] [--repeats 3]

Plain ASMK walks in Python over the query images and the words of each, and compares codes in numpy, list by list. 200
images of 300 features in 8,192 words, of 64 and of 1,024 dimensions, must get the same scores to 1e-6.

The whole stage, from features to graph, runs for each number of `--images` in a process of its own, whose memory is
the kernel's count. With 64 dimensions, 10,000 images take minutes. Making up the features is not counted.

Places have 20 images each. An image sees 200 of the 400 features of its place, with noise, and 100 that no other has.
All features lie about common appearances, of which some are frequent and most are rare, as in photos.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import common
import numpy as np
from numpy.typing import NDArray

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.progress import SilentProgress
from mast3r_sfm.retrieval.asmk import ALPHA, DATABASE_WORDS, QUERY_WORDS, BinaryFeatures, describe, score
from mast3r_sfm.retrieval.codebook import Codebook
from mast3r_sfm.retrieval.stage import choose_pairs
from mast3r_sfm.types import Encoding, Float32, ImageRecord, ImageSet, PixelTransform, Reason

FEATURES = 300
IMAGES_PER_PLACE = 20
SEEN, OF_PLACE = 200, 400
APPEARANCES = 3000
NOISE = 0.45
"""Of a feature between two images, in units of its standard deviation about its appearance."""
PLAIN_IMAGES, PLAIN_WORDS = 200, 8192
DIMENSIONS = (64, 1024)
BAR = 10.0
TOLERANCE = 1e-6


class Photos(Sequence[Encoding]):
    """Made-up features, made when they are asked for; the time this took is kept."""

    def __init__(self, count: int, dimension: int) -> None:
        self._count = count
        self._dimension = dimension
        generator = np.random.default_rng(0)
        self._appearances = generator.standard_normal((APPEARANCES, dimension)).astype(np.float32)
        frequency = 1 / np.arange(1, APPEARANCES + 1) ** 0.5
        self._frequency = np.cumsum(frequency / frequency.sum())
        self._place = lru_cache(maxsize=2)(self._make_place)
        self.seconds = self.cpu_seconds = 0.0

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Encoding: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoding]: ...
    def __getitem__(self, index: int | slice) -> Encoding | Sequence[Encoding]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin, cpu_begin = time.perf_counter(), time.process_time()
        generator = np.random.default_rng((2, index))
        place = self._place(index // IMAGES_PER_PLACE)
        seen = place[generator.choice(OF_PLACE, SEEN, replace=False)]
        seen = seen + NOISE * generator.standard_normal(seen.shape, dtype=np.float32)
        tokens = np.concatenate([seen, self._draw(generator, FEATURES - SEEN)])
        encoding = Encoding(
            tokens=tokens.astype(np.float16),
            xy=np.zeros((FEATURES, 2), np.float32),
            attention=np.ones(FEATURES, np.float32),
            transform=PixelTransform(matrix=np.eye(2, 3)),
            network_size=(64, 64),
        )
        self.seconds += time.perf_counter() - begin
        self.cpu_seconds += time.process_time() - cpu_begin
        return encoding

    def _make_place(self, place: int) -> Float32:
        return self._draw(np.random.default_rng((1, place)), OF_PLACE)

    def _draw(self, generator: np.random.Generator, count: int) -> Float32:
        kind = np.searchsorted(self._frequency, generator.random(count) * self._frequency[-1])
        own: Float32 = generator.standard_normal((count, self._dimension), dtype=np.float32)
        return self._appearances[kind] + own


class Clock(SilentProgress):
    """When the parts of the stage ended, and how long making up features had taken until the first of them."""

    def __init__(self, photos: Photos) -> None:
        self._photos = photos
        self._left = 2 * len(photos)
        self.learnt = self.described = self.made_up = 0.0

    def note(self, message: str) -> None:  # noqa: ARG002
        """The first note is that of the codebook."""
        if not self.learnt:
            self.learnt, self.made_up = time.perf_counter(), self._photos.seconds

    def advance(self, steps: int = 1) -> None:
        """The last step is that of the last image described."""
        self._left -= steps
        if not self._left:
            self.described = time.perf_counter()


def plain_scores(query: BinaryFeatures, database: BinaryFeatures) -> NDArray[np.float64]:
    """ASMK as one would write it down: for each query image and each of its words, the list of the word."""
    lists: dict[int, tuple[list[int], list[NDArray[np.uint32]]]] = {}
    for image, word, code in zip(database.image.tolist(), database.word.tolist(), database.code, strict=True):
        images, codes = lists.setdefault(word, ([], []))
        images.append(image)
        codes.append(code)
    inverted = {word: (np.array(images), np.stack(codes)) for word, (images, codes) in lists.items()}
    bits = 32 * query.code.shape[1]
    scores = np.zeros((query.num_images, database.num_images))
    first = np.searchsorted(query.image, np.arange(query.num_images + 1))
    for image in range(query.num_images):
        for entry in range(first[image], first[image + 1]):
            found = inverted.get(int(query.word[entry]))
            if found is None:
                continue
            images, codes = found
            similarity = 1 - 2 * np.bitwise_count(codes ^ query.code[entry]).sum(axis=1) / bits
            near = similarity > 0
            scores[image, images[near]] += similarity[near] ** ALPHA
    sizes = [np.maximum(np.bincount(side.image, minlength=side.num_images), 1) for side in (query, database)]
    return scores / np.sqrt(np.outer(*sizes))


def coded_features(dimension: int) -> tuple[BinaryFeatures, BinaryFeatures]:
    """The images of the comparison as queries and as a database; words are some of the features."""
    photos = Photos(PLAIN_IMAGES, dimension)
    tokens = np.concatenate([photos[i].tokens for i in range(len(photos))]).astype(np.float32)
    image = np.repeat(np.arange(PLAIN_IMAGES, dtype=np.int32), FEATURES)
    codebook = Codebook(tokens[np.random.default_rng(3).permutation(len(tokens))[:PLAIN_WORDS]])
    words = codebook.nearest(tokens, QUERY_WORDS)
    query, database = (
        describe(tokens, image, words[:, :assigned], codebook.centroids, PLAIN_IMAGES)
        for assigned in (QUERY_WORDS, DATABASE_WORDS)
    )
    return query, database


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def against_plain(dimension: int, repeats: int) -> dict[str, Any]:
    """Seconds of both ways, the fastest of several runs in turns, and how far their scores are apart."""
    query, database = coded_features(dimension)
    fast, plain = [], []
    for _ in range(repeats):
        seconds, expected = timed(lambda: plain_scores(query, database))
        plain.append(seconds)
        for _ in range(3):
            seconds, found = timed(lambda: score(query, database))
            fast.append(seconds)
    return {
        "plain_seconds": min(plain),
        "seconds": min(fast),
        "ratio": min(plain) / min(fast),
        "largest_difference": float(np.abs(found - expected).max()),
        "largest_score": float(expected.max()),
    }


def run_stage(count: int, dimension: int, threads: int) -> dict[str, Any]:
    """The whole stage in this process."""
    photos = Photos(count, dimension)
    clock = Clock(photos)
    records = [ImageRecord(name=f"{index:06}", width_px=64, height_px=64, sha256="") for index in range(count)]
    names = ImageSet(root=Path(), records=tuple(records))
    begin, cpu_begin = time.perf_counter(), time.process_time()
    chosen = choose_pairs(photos, names, PairsConfig(), model_tokens=FEATURES, seed=0, progress=clock, threads=threads)
    end, cpu_end = time.perf_counter(), time.process_time()
    graph = chosen.graph
    same = np.equal(*(graph.pairs[graph.reason == Reason.NEIGHBOUR] // IMAGES_PER_PLACE).T)
    return {
        "seconds": end - begin - photos.seconds,
        "learn_seconds": clock.learnt - begin - clock.made_up,
        "describe_seconds": clock.described - clock.learnt - (photos.seconds - clock.made_up),
        "score_and_graph_seconds": end - clock.described,
        "cpu_seconds": cpu_end - cpu_begin - photos.cpu_seconds,
        "pairs": len(graph.pairs),
        "reserve": len(chosen.reserve.pairs),
        "same_place_share": float(same.mean()),
    }


def in_own_process(count: int, dimension: int, threads: int) -> dict[str, Any]:
    """The whole stage in a process of its own, with the most memory that it held."""
    run = common.run_child(
        [sys.executable, __file__, "--stage", str(count), "--dimension", str(dimension), "--threads", str(threads)]
    )
    if run.code:
        raise RuntimeError(f"{count} images: exit code {run.code}\n{run.stderr}")
    return {**json.loads(run.stdout.splitlines()[-1]), "peak_mb": run.peak_mb}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--dimension", type=int, default=64, help="of the features of the whole stage")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        common.print_json(run_stage(options.stage, options.dimension, options.threads))
        return

    # First, because the kernel counts what this process holds when it starts another as memory of that one.
    stages = {count: in_own_process(count, options.dimension, options.threads) for count in options.images}
    rows = [[name, *(figures[name] for figures in stages.values())] for name in stages[options.images[0]]]
    common.print_table(["whole stage", *(f"{count:,} images" for count in stages)], rows)
    compared = {dimension: against_plain(dimension, options.repeats) for dimension in DIMENSIONS}
    print()
    rows = [[name, *(figures[name] for figures in compared.values())] for name in compared[DIMENSIONS[0]]]
    common.print_table([f"{PLAIN_IMAGES} images", *(f"{dimension}-d" for dimension in compared)], rows)
    for dimension, figures in compared.items():
        assert figures["largest_difference"] < TOLERANCE, f"{dimension}-d: the scores differ"
    first, last = (stages[count] for count in (min(stages), max(stages)))
    growing = ("seconds", "score_and_graph_seconds", "cpu_seconds", "peak_mb")
    common.print_json(
        {f"ratio_plain_{dimension}d": round(figures["ratio"], 1) for dimension, figures in compared.items()}
        | {"ratio_lowest": round(min(figures["ratio"] for figures in compared.values()), 1), "bar": BAR}
        | {f"growth_{name}": round(last[name] / first[name], 2) for name in growing}
        | {"threads": options.threads, "compared": compared, "stages": stages}
    )


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when faiss is loaded, so too late now. Threads that spin while they wait, as they do otherwise,
        # take the processor from the scoring threads, and from other processes.
        threads = sys.argv[sys.argv.index("--threads") + 1] if "--threads" in sys.argv else "2"
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    main()
