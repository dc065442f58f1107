"""What must not be in the project's files, and what must be true of its scripts."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

# Folders of one machine, which a reader elsewhere does not have.
ABSOLUTE = re.compile(r"(?<![\w.~}])/(work|root|home|Users)/\w")
SCRIPTS = ["scripts/setup", "scripts/demo", "scripts/test", ".ci/run"]


def project_files(repository: Path) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout: no list of the project's files")
    paths = [repository / os.fsdecode(name) for name in listing.stdout.split(b"\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_path_of_one_machine(repository: Path) -> None:
    files = project_files(repository)
    assert len(files) > 30
    found = []
    for path in files:
        data = path.read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
            if ABSOLUTE.search(line):
                found.append(f"{path.relative_to(repository)}:{number}: {line.strip()}")
    assert found == []


def test_the_project_is_small_enough_to_clone(repository: Path) -> None:
    sizes = {path: path.stat().st_size for path in project_files(repository)}
    assert sum(sizes.values()) < 20_000_000
    assert max(sizes.values()) < 2_000_000, max(sizes, key=lambda path: sizes[path])


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_run(name: str, repository: Path) -> None:
    script = repository / name
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    subprocess.run(["bash", "-n", script], check=True)
