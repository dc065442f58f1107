"""The pairs stage of a run: what it depends on, and how it stands on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mast3r_sfm.config import PairsConfig, fingerprint
from mast3r_sfm.errors import InputError
from mast3r_sfm.progress import Progress
from mast3r_sfm.retrieval.official import OfficialRetrieval
from mast3r_sfm.retrieval.stage import ChosenPairs, choose_pairs
from mast3r_sfm.storage.cache import Arrays, StageCache
from mast3r_sfm.types import Encoding, ImageSet, ViewGraph

CODE_VERSION = 4


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Chooses the pairs of a collection."""

    photos: ImageSet
    config: PairsConfig
    model_tokens: int
    """Tokens of highest attention that suit the model."""
    seed: int
    threads: int = 1
    """That score images side by side; the result does not depend on their number."""
    official: OfficialRetrieval | None = None
    """What the photos are compared by, where official files say it."""

    def key(self, encode_key: str) -> str:
        """Of what the pairs depend on: the list of pairs and official files count by their content, wherever they lie.

        Raises:
            InputError: the list of pairs cannot be read.
        """
        digest = ""
        if self.config.file:
            try:
                digest = hashlib.sha256(Path(self.config.file).read_bytes()).hexdigest()
            except OSError as error:
                raise InputError(f"cannot read the list of pairs {self.config.file}: {error.strerror}") from error
        settings = replace(self.config, file=digest, retrieval="auto")
        official = self.official.fingerprint if self.official else ""
        positions = [record.gps for record in self.photos.records]
        return fingerprint("pairs", CODE_VERSION, encode_key, settings, official, self.seed, positions)

    def choose(self, encodings: Sequence[Encoding], cache: StageCache, progress: Progress) -> tuple[ChosenPairs, int]:
        """The pairs, and the number of chunks found finished; arguments and errors as for `choose_pairs`."""
        stored = cache.read(0)
        if stored is not None:
            return _unpack(stored[0], len(self.photos)), 1
        chosen = choose_pairs(
            encodings,
            self.photos,
            self.config,
            model_tokens=self.model_tokens,
            seed=self.seed,
            progress=progress,
            threads=self.threads,
            vocabulary=self.official.vocabulary(self.config.tokens_per_image) if self.official else None,
        )
        arrays = _pack(chosen)
        cache.write(0, arrays)
        return _unpack(arrays, len(self.photos)), 0


def _pack(chosen: ChosenPairs) -> Arrays:
    return {
        **_pack_graph("graph", chosen.graph),
        **_pack_graph("reserve", chosen.reserve),
        "similarity": chosen.similarity.astype(np.float16),
    }


def _unpack(arrays: Arrays, num_images: int) -> ChosenPairs:
    return ChosenPairs(
        graph=_unpack_graph("graph", arrays, num_images),
        reserve=_unpack_graph("reserve", arrays, num_images),
        similarity=arrays["similarity"].astype(np.float32),
    )


def _pack_graph(name: str, graph: ViewGraph) -> Arrays:
    return {f"{name}.pairs": graph.pairs, f"{name}.score": graph.score, f"{name}.reason": graph.reason}


def _unpack_graph(name: str, arrays: Arrays, num_images: int) -> ViewGraph:
    return ViewGraph(
        num_images=num_images,
        pairs=arrays[f"{name}.pairs"],
        score=arrays[f"{name}.score"],
        reason=arrays[f"{name}.reason"],
    )
