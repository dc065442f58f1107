"""Every error the library raises on purpose.

::

    Mast3rSfmError
    ├── InputError              photos, masks or ground truth that cannot be used
    ├── ConfigError             an option that does not exist or has an impossible value
    ├── WeightsError            a model or its weights are missing or do not fit
    ├── ArtifactError           a stage's file on disk is missing, broken or cannot be written
    ├── ShapeError              an array whose shape, dtype or values break a contract
    ├── ReconstructionError     everything ran, but no model could be made from these photos
    └── DivergedError           an optimisation ended in NaN or in nonsense

A message says what is wrong, where, and what to do next. `exit_code` is what the command line returns for it.
"""

from __future__ import annotations

from collections.abc import Sequence


class Mast3rSfmError(Exception):
    """Base of all errors of this package."""

    exit_code = 2


class InputError(Mast3rSfmError):
    """The user's files cannot be used as they are."""


class ConfigError(Mast3rSfmError):
    """A setting is unknown or has an impossible value."""


class WeightsError(Mast3rSfmError):
    """A model, or the weights it needs, cannot be loaded."""


class ArtifactError(Mast3rSfmError):
    """A file that one stage leaves for the next is missing, broken or cannot be written."""


class ShapeError(Mast3rSfmError):
    """An array breaks the contract of the function or type that received it."""


class ReconstructionError(Mast3rSfmError):
    """The chain ran, but these photos do not carry a reconstruction."""

    exit_code = 1


class DivergedError(Mast3rSfmError):
    """An optimisation produced NaN or infinite values."""

    exit_code = 1


def some_of(names: Sequence[str], most: int = 10) -> str:
    """The first of some names, and how many more there are, as messages list them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
