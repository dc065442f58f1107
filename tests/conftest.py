"""What all tests share: the folders of test material, and reproducible, modest use of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Nothing here is timed, and a failure on one machine must be a failure on every machine.
settings.register_profile("mast3r_sfm", deadline=None, derandomize=True)
settings.load_profile("mast3r_sfm")

torch.set_num_threads(min(2, os.cpu_count() or 1))


def _material(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / default)
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set {variable} to a folder of the same form to run this test")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the project."""
    return ROOT


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Parity files: MAST3R_SFM_GOLDEN, by default ../shared/golden."""
    return _material("MAST3R_SFM_GOLDEN", "golden")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real photo sets: MAST3R_SFM_DATA, by default ../shared/data."""
    return _material("MAST3R_SFM_DATA", "data")
