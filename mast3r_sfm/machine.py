"""What this process runs on, and what it has used of it."""

from __future__ import annotations

import importlib.metadata
import os
import sys


def usable_cpus() -> int:
    """How many CPUs this process may use; fewer than the machine has, in a container or a batch job."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def peak_memory_mb() -> float:
    """The most memory that this process has held so far."""
    import resource  # here, so that the rest of this module works where there is none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def installed_version(package: str) -> str | None:
    """The version of a package, None where it is not installed; the package itself is not imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
