"""The encode stage: every photo passes an encoder once, and what comes out stands on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from mast3r_sfm.config import fingerprint
from mast3r_sfm.images.loading import load_image
from mast3r_sfm.images.masks import Masks
from mast3r_sfm.models.base import ImageModel
from mast3r_sfm.progress import Progress, steps
from mast3r_sfm.storage.cache import StageCache
from mast3r_sfm.storage.encodings import IMAGES_PER_CHUNK, StoredEncodings, pack
from mast3r_sfm.types import Encoding, ImageRecord, LoadedImage

CODE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes some photos by one model."""

    model: ImageModel
    root: Path
    records: Sequence[ImageRecord]
    threads: int
    masks: Masks | None = None
    """Of the photos; None: all of every photo may be used."""

    @property
    def key(self) -> str:
        """Of what the photos and their masks hold and how they are encoded."""
        contents = [
            (record.name, record.sha256, record.orientation, *filter(None, [record.mask_sha256]))
            for record in self.records
        ]
        return fingerprint("encode", CODE_VERSION, self.model.fingerprint, self.model.preparation, contents)

    def encode(self, stage: str, cache: StageCache, progress: Progress) -> tuple[StoredEncodings, int]:
        """Encode what does not stand in `cache` yet.

        Returns:
            the encodings in the order of the records, and the number of chunks found finished.
        """
        resumed = 0
        with (
            steps(progress, stage, len(self.records), "image"),
            # Small networks: images side by side, each on one thread, are half again as fast as one on several threads.
            torch_threads(1 if self.model.images_at_once == 1 else self.threads),
            ThreadPoolExecutor(self.threads) as pool,
        ):
            for chunk, start in enumerate(range(0, len(self.records), IMAGES_PER_CHUNK)):
                records = self.records[start : start + IMAGES_PER_CHUNK]
                if cache.read(chunk) is not None:
                    resumed += 1
                    progress.advance(len(records))
                    continue
                encodings: list[Encoding] = []
                for some in self._encode_all(records, pool):
                    encodings += some
                    progress.advance(len(some))
                cache.write(chunk, *pack(encodings))
        return StoredEncodings(cache, len(self.records)), resumed

    def _encode_all(self, records: Sequence[ImageRecord], pool: ThreadPoolExecutor) -> Iterator[list[Encoding]]:
        if self.model.images_at_once == 1:
            yield from pool.map(lambda record: self.model.encode([self._load(record)]), records)
            return
        loaded = pool.map(self._load, records)
        while some := list(islice(loaded, self.model.images_at_once)):
            yield self.model.encode(some)

    def _load(self, record: ImageRecord) -> LoadedImage:
        loaded = load_image(self.root, record, self.model.preparation)
        return loaded if self.masks is None else replace(loaded, mask=self.masks.read(record))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
