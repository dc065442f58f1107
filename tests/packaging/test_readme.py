"""The commands and files that README.md names: run on the example's photos, or named here with the reason why not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# The start of a command, and why a test does not run it.
NOT_RUN = {
    "./scripts/demo": "makes .venv and installs from the network",
    "./scripts/setup": "makes .venv and installs from the network",
    "./scripts/test": "runs this test",
    "source .venv/bin/activate": "the test has an environment of its own",
    "colmap gui": "needs COLMAP's viewer and a screen",
    "mast3r-sfm align out/sparse/0 in_metres": "the example's photos have no GPS positions",
    "mast3r-sfm weights download": "needs the network, and takes 2.8 GB",
    "mast3r-sfm weights verify": "needs weights that are not part of this project",
    "mast3r-sfm reconstruct photos -o out --model mast3r": "needs weights that are not part of this project",
    "mast3r-sfm reconstruct photos -o out --model checkpoint.pth": "needs weights that are not part of this project",
    "pip uninstall": "would take the packages away from the other tests",
}


def blocks(repository: Path, language: str) -> list[str]:
    text = (repository / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(repository: Path) -> list[str]:
    """The commands of all bash blocks, in order, without comments; a line that ends in \\ goes on."""
    lines = "".join(blocks(repository, "bash")).replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"\s+#\s.*$|^#.*$", "", line).strip() for line in lines)
    return [line for line in stripped if line]


def is_run(command: str) -> bool:
    return not command.startswith(tuple(NOT_RUN))


@pytest.fixture(scope="module")
def workplace(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it after the demo: `photos`, `examples`, and the demo's model."""
    folder = tmp_path_factory.mktemp("readme")
    (images,) = (repository / "examples").glob("*/images")
    shutil.copytree(images, folder / "photos")
    (folder / "examples").symlink_to(repository / "examples", target_is_directory=True)
    return folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": programs}, capture_output=True, text=True, check=False
    )


def test_what_the_readme_says_works(repository: Path, workplace: Path) -> None:
    runnable = [command for command in commands(repository) if is_run(command)]
    assert any(command.startswith("mast3r-sfm reconstruct photos") for command in runnable)
    for command in runnable:
        assert command.startswith("mast3r-sfm "), f"neither run nor named in NOT_RUN: {command}"
        done = run(["bash", "-euo", "pipefail", "-c", command], workplace)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for script in blocks(repository, "python"):
        done = run([sys.executable, "-c", script], workplace)
        assert done.returncode == 0, f"{script}\n{done.stderr}"
        assert len(done.stdout) > 0
    text = (repository / "README.md").read_text(encoding="utf-8")
    outputs = re.findall(r"^\| `(out/\S+)` \|", text, re.MULTILINE)
    assert len(outputs) >= 4
    missing = [name for name in outputs if not (workplace / name).exists()]
    assert missing == []


def test_every_exception_is_still_in_the_readme(repository: Path) -> None:
    unused = [start for start in NOT_RUN if not any(command.startswith(start) for command in commands(repository))]
    assert unused == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design.md"])
def test_links_inside_the_project_lead_somewhere(page: str, repository: Path) -> None:
    path = repository / page
    targets = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert missing == []
