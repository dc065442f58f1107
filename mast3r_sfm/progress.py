"""How the library tells the outside what it is doing, without printing.

The command line implements `Progress` with tqdm; a caller of the library may pass its own, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives the course of a run. Calls come from one thread, stages do not nest."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """A stage begins; it has `total` steps of `unit` ("image", "pair", …); 0 if the number is not known."""

    def advance(self, steps: int = 1) -> None:
        """`steps` more of the running stage's steps are done."""

    def finish(self) -> None:
        """The running stage has ended, well or not."""

    def note(self, message: str) -> None:
        """Something a user wants to know: which model was taken, what a stage decided."""

    def warn(self, message: str) -> None:
        """Something a user must know: a photo left out, a weak link, a broken cache file."""


class SilentProgress:
    """The default: drops everything."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """Do nothing."""

    def advance(self, steps: int = 1) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Do nothing."""

    def warn(self, message: str) -> None:
        """Do nothing."""


@contextmanager
def steps(progress: Progress, stage: str, total: int, unit: str) -> Iterator[None]:
    """`with steps(progress, "encode", 50, "image"):` starts the stage and finishes it whatever happens inside."""
    progress.start(stage, total, unit)
    try:
        yield
    finally:
        progress.finish()
