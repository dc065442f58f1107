"""Helpers of the tests on photos: textured images, files made of them, and a progress that remembers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image


class Recorder:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.stages: list[tuple[str, int, str]] = []
        self.advanced = 0
        self.finished = 0

    def start(self, stage: str, total: int, unit: str) -> None:
        self.stages.append((stage, total, unit))

    def advance(self, steps: int = 1) -> None:
        self.advanced += steps

    def finish(self) -> None:
        self.finished += 1

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="session")
def textured() -> Callable[..., NDArray[np.uint8]]:
    """textured(width, height, seed=0): a photo-like image [H, W, 3] with content at every scale above four pixels."""

    def make(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))

    return make


@pytest.fixture
def photo(tmp_path: Path, textured: Callable[..., NDArray[np.uint8]]) -> Callable[..., Path]:
    """Writes a textured photo: photo("a.jpg", width=100, height=80, seed=1, exif=...)."""

    def write(name: str, *, width: int = 120, height: int = 90, seed: int = 0, **options: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(textured(width, height, seed)).save(path, **options)
        return path

    return write
