"""`config show`, --config and --set."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mast3r_sfm.config import Config
from mast3r_sfm_cli.config import read_config
from mast3r_sfm_cli.main import run


def test_show_prints_the_defaults_as_a_process(run_command: Callable[..., Any]) -> None:
    result = run_command("config", "show")
    assert result.code == 0
    assert Config.from_mapping(tomllib.loads(result.out)) == Config()


def test_assignments_go_over_the_file_which_goes_over_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my settings.toml"
    file.write_text("seed = 5\n[pairs]\nneighbours = 3\nkeyframes = 7\n")
    assert run(["config", "show", "--config", str(file), "--set", "pairs.neighbours=4", "--set", "seed = 6"]) == 0
    shown = tomllib.loads(capsys.readouterr().out)
    assert (shown["seed"], shown["pairs"]["neighbours"], shown["pairs"]["keyframes"]) == (6, 4, 7)


def test_what_is_shown_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "show", "--set", "prepare.cameras=folder", "--set", "encode.max_size_px=800"]) == 0
    file = tmp_path / "config.toml"
    file.write_text(capsys.readouterr().out)
    config = read_config(file, ())
    assert (config.prepare.cameras, config.encode.max_size_px) == ("folder", 800)


@pytest.mark.parametrize(
    ("assignment", "part"),
    [
        ("pairs.neighbors=3", "did you mean pairs.neighbours"),
        ("pairs=3", "stage"),
        ("pairs.neighbours", "stage.key=value"),
        ("pairs.neighbours=many", "number"),
        ("pairs.neighbours=0", "at least 1"),
        ("prepare.cameras=shared", "auto, single, folder, image"),
        ("seed.x=1", "seed"),
        ("match.min_similarity=nan", "finite"),
    ],
)
def test_wrong_settings_are_explained(assignment: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "show", "--set", assignment]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert part in err


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"[pairs\n", "TOML"), (b"\xff\xfe", "TOML"), (b"[pair]\nneighbours = 3\n", "did you mean pairs"), (None, "read")],
)
def test_wrong_files_are_explained(
    content: bytes | None, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    if content is not None:
        file.write_bytes(content)
    assert run(["config", "show", "--config", str(file)]) == 2
    assert part in capsys.readouterr().err
