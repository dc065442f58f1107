"""Photos against a model that there is: its points anew, or further photos in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mast3r_sfm.config import Config, KnownConfig, RunOptions
from mast3r_sfm.errors import ConfigError, InputError, some_of
from mast3r_sfm.known import match_names
from mast3r_sfm.known_files import KnownFile, read_known_file
from mast3r_sfm.pipeline import reconstruct
from mast3r_sfm.progress import Progress
from mast3r_sfm.summaries import RunReport


def triangulate(
    images: Path,
    model: Path,
    output: Path,
    config: Config | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Match the photos of a model anew and triangulate points from its poses and cameras, which stay as they are.

    Args:
        images: folder with its photos; others in it take no part.
        model: a COLMAP model, or a gt.json with K of every image.
        output: as for `reconstruct`.
        config: as for `reconstruct`, without `known`.
        options: as for `reconstruct`.
        progress: as for `reconstruct`.

    Raises:
        InputError: the model cannot be read, lacks poses or cameras, or has images whose photos are not there.
        ConfigError: `config.known` says something else.
    """
    known = _around(images, model, config)
    return reconstruct(images, output, _with(config, replace(known, only_posed=True)), options, progress)


def register(
    images: Path,
    model: Path,
    output: Path,
    config: Config | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    *,
    refine: bool = False,
) -> RunReport:
    """Add the photos that a model does not hold to it; what it holds keeps its cameras and poses.

    New photos share the camera of those of the model with which `prepare.cameras` groups them, where these have one.
    The report's notes say who was added, and `left_out` who was not, and why.

    Args:
        images: folder with the model's photos and the new ones.
        model: a COLMAP model, or a gt.json with K of every image.
        output: as for `reconstruct`; it gets the whole model.
        config: as for `reconstruct`, without `known`.
        options: as for `reconstruct`.
        progress: as for `reconstruct`.
        refine: have the poses of the model refined, too; the result stays in its frame.

    Raises:
        InputError, ConfigError: as for `triangulate`.
    """
    known = replace(
        _around(images, model, config), poses_mode="prior" if refine else "fixed", intrinsics_of_groups=True
    )
    return reconstruct(images, output, _with(config, known), options, progress)


def _with(config: Config | None, known: KnownConfig) -> Config:
    return replace(config or Config(), known=known)


def _around(images: Path, model: Path, config: Config | None) -> KnownConfig:
    if config is not None and config.known != KnownConfig():
        raise ConfigError(f"settings of known.… have no place here: cameras and poses are those of {model}")
    file = read_known_file(model)
    _check(file, images)
    return KnownConfig(intrinsics=str(model), poses=str(model))


def _check(file: KnownFile, images: Path) -> None:
    if len(file.poses) < 2:
        raise InputError(
            f"{file.path} tells {len(file.poses)} poses; it takes two or more, of a COLMAP model or gt.json"
        )
    without = sorted(file.poses.keys() - file.cameras.keys())
    if without:
        raise InputError(f"{file.path} has poses but no cameras of {some_of(without)}; a gt.json needs K, too")
    if not images.is_dir():
        return  # `reconstruct` says so
    missing = sorted(name for name in file.poses if not (images / name).is_file())
    if missing:  # by these names; others may mean them
        present = [path.relative_to(images).as_posix() for path in images.rglob("*") if path.is_file()]
        missing = sorted(file.poses.keys() - match_names(file.poses, present).keys())
    if missing:
        raise InputError(
            f"{len(missing)} of {len(file.poses)} images of {file.path} have no photo in {images}: {some_of(missing)}; "
            "all are needed, to be matched"
        )
