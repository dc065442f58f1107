"""What is installed: the list of packages, the wheel, the dependencies and their tested versions."""

from __future__ import annotations

import ast
import configparser
import email
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import mast3r_sfm

# Folder of the project → package that it is installed as.
SOURCES = {"mast3r_sfm": "mast3r_sfm", "cli": "mast3r_sfm_cli"}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def modules(repository: Path) -> dict[str, Path]:
    """Path inside the wheel of every module, and its source."""
    return {
        f"{package}/{path.relative_to(repository / folder).as_posix()}": path
        for folder, package in SOURCES.items()
        for path in sorted((repository / folder).rglob("*.py"))
    }


def test_the_list_of_packages_is_complete(repository: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(repository / "setup.cfg", encoding="utf-8")
    listed = setup["options"]["packages"].split()
    folders = {Path(name).parent for name in modules(repository)}
    assert listed == sorted(".".join(folder.parts) for folder in folders)
    for folder in folders:
        assert f"{folder.as_posix()}/__init__.py" in modules(repository), f"{folder} has no __init__.py"


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy: setuptools leaves its build folder, and takes over what lies in it."""
    copy = tmp_path_factory.mktemp("source")
    for name in (*SOURCES, "pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    target = tmp_path_factory.mktemp("wheel")
    build = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, copy],
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (path,) = target.glob("*.whl")
    return path


def test_the_wheel_holds_the_sources_and_nothing_else(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == {*modules(repository), "mast3r_sfm/py.typed"}
        for name, source in modules(repository).items():
            assert archive.read(name) == source.read_bytes()


def test_the_wheel_says_what_it_is(wheel: Path, repository: Path) -> None:
    folder = f"mast3r_sfm-{mast3r_sfm.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        licence = archive.read(f"{folder}/licenses/LICENSE")
    assert metadata["Version"] == mast3r_sfm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "mast3r-sfm = mast3r_sfm_cli.main:main" in entry_points
    assert licence == (repository / "LICENSE").read_bytes()
    assert b"Apache License" in licence
    assert b"END OF TERMS AND CONDITIONS" in licence


def test_the_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel],
        check=True,
    )
    # PYTHONPATH comes before the editable install, so that these are the wheel's files and not the project's.
    environment = {"PYTHONPATH": str(target), "PATH": ""}
    where = subprocess.run(
        [sys.executable, "-c", "import mast3r_sfm, mast3r_sfm_cli.main as m; print(mast3r_sfm.__file__, m.__file__)"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(Path(file).is_relative_to(target) for file in where.stdout.split())
    version = subprocess.run(
        [target / "bin" / "mast3r-sfm", "--version"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert mast3r_sfm.__version__ in version.stdout


def test_every_import_is_declared_and_every_dependency_imported(repository: Path, project: dict[str, Any]) -> None:
    imported, read = set(), set()
    for path in modules(repository).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.metadata.files":
                read.add(canonicalize_name(ast.literal_eval(node.args[0])))  # its files are used one by one
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - set(SOURCES.values())
    distributions = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    needed = {canonicalize_name(distributions[name][0]) for name in third_party} | read
    assert needed == declared


def constraints(repository: Path) -> dict[str, Version]:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(pins), "constraints.txt holds only lines of the form name==version"
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins if pin}


def test_the_tested_versions_fit_the_declared_ranges(repository: Path, project: dict[str, Any]) -> None:
    pins = constraints(repository)
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text
        assert any(spec.operator == ">=" for spec in requirement.specifier), f"{text} has no lower bound"


def test_transitive_dependencies_are_pinned_too(repository: Path, project: dict[str, Any]) -> None:
    waiting = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])]
    needed = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        # The CUDA builds of torch bring these along, its CPU builds do not.
        if (name, *requirement.extras) in needed or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        needed.add((name, *requirement.extras))
        for text in importlib.metadata.requires(name) or []:
            inner = Requirement(text)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(inner)
    assert {name for name, *_ in needed} == constraints(repository).keys()
