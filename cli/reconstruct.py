"""`mast3r-sfm reconstruct`: from a folder of photos to a COLMAP model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mast3r_sfm.config import RunOptions
from mast3r_sfm_cli.config import read_config, settings_options
from mast3r_sfm_cli.folders import check_output, image_folder, image_options
from mast3r_sfm_cli.known import cameras_option, known_assignments, known_options
from mast3r_sfm_cli.pairs import pairs_assignments, pairs_options
from mast3r_sfm_cli.running import run_and_report


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line of `reconstruct`."""

    images: Path | None
    image_path: Path | None
    mask_path: str | None
    output: Path
    config_file: Path | None
    assignments: tuple[str, ...]
    model: str | None
    seed: int | None
    features: str | None
    resolution: str | None
    camera_model: str | None
    file_format: str | None
    pairs_source: str | None
    pairs_file: str | None
    keyframes: int | None
    neighbours: int | None
    window: int | None
    time_budget: float | None
    single_camera: bool
    cameras: str | None
    intrinsics: str | None
    intrinsics_prior: bool
    poses: str | None
    poses_prior: bool
    device: str
    dtype: str | None
    tf32: bool
    compiled: bool
    threads: int
    as_json: bool
    quiet: bool
    resume: bool
    overwrite: bool
    mapper: str | None

    @property
    def all_assignments(self) -> Sequence[str]:
        """--set and the options that stand for one of its settings; the latter win."""
        shorthands = {
            "encode.model": self.model,
            "match.dtype": self.dtype,
            "seed": self.seed,
            "match.features": self.features,
            "match.resolution": self.resolution,
            "map.camera_model": self.camera_model,
            "match.time_budget_min": self.time_budget,
            "map.mapper": self.mapper,
            "prepare.cameras": self.cameras,
            "prepare.mask_path": self.mask_path,
            "export.format": self.file_format,
        }
        own = [f"{name}={value}" for name, value in shorthands.items() if value is not None]
        if self.single_camera and self.cameras is None:
            own.append("prepare.cameras=single")
        return [*self.assignments, *own, *pairs_assignments(vars(self)), *known_assignments(vars(self))]


@click.command()
@image_options
@click.option(
    "--model",
    metavar="NAME",
    help="auto (the best that is installed), xfeat, mast3r, … or the path of a checkpoint.  [default: auto]",
)
@settings_options
@pairs_options
@click.option(
    "--time-budget",
    type=float,
    metavar="MINUTES",
    help="For matching; the most similar pairs come first.  [default: as long as it takes]",
)
@click.option(
    "--features",
    metavar="NAME",
    help="What is matched: model, sift or both; auto: the model's, and SIFT's too where little ties photos together.  "
    "[default: auto]",
)
@click.option(
    "--resolution",
    metavar="NAME",
    help="Of matches by a pointmap model: coarse (of what it sees) or fine (of the photo).  [default: fits the device]",
)
@click.option("--seed", type=int, help="The same seed gives the same result.  [default: 0]")
@click.option(
    "--camera-model",
    metavar="NAME",
    help="COLMAP's camera model of the result, such as OPENCV or OPENCV_FISHEYE.  [default: SIMPLE_RADIAL]",
)
@click.option(
    "--mapper",
    metavar="NAME",
    help="What makes the model of the matches: align (ours), or COLMAP's global or incremental.  [default: align]",
)
@click.option("--single-camera", is_flag=True, help="All photos of one size were taken with one camera and lens.")
@cameras_option
@known_options
@click.option(
    "--format",
    "file_format",
    metavar="NAME",
    help="Of the models: binary, text, or colmap-3.8, for older readers.  [default: binary]",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@click.option("--dtype", metavar="TYPE", help="Of a decoder: float32, float16 or bfloat16.  [default: fits the device]")
@click.option("--tf32", is_flag=True, help="Let CUDA round float32 products: several times faster.")
@click.option("--compile", "compiled", is_flag=True, help="Let torch.compile fuse the network; needs a C++ compiler.")
@click.option("--threads", default=0, help="CPU threads.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, the content of run.json, on stdout.")
@click.option("--quiet", is_flag=True, help="No progress and no summary; warnings and errors only.")
@click.option("--resume/--no-resume", default=True, help="Go on where an earlier run to OUT stopped.  [default: yes]")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Write to OUT even where it holds other files; sparse/ and database.db are replaced.",
)
def reconstruct(**flags: Any) -> int:
    """Turn the photos in the folder IMAGES into a COLMAP model in the folder OUT.

    Sub-folders are included. The result is OUT/sparse/0, the largest model, and further models if the photos show
    separate places. OUT/run.json says what was done, and which photos were left out and why.
    """
    return _run(Flags(**flags))


def _run(flags: Flags) -> int:
    config = read_config(flags.config_file, flags.all_assignments)
    options = RunOptions(
        device=flags.device, threads=flags.threads, tf32=flags.tf32, compiled=flags.compiled, resume=flags.resume
    )
    images = image_folder(flags.images, flags.image_path)
    check_output(images, flags.output, overwrite=flags.overwrite)

    from mast3r_sfm.pipeline import reconstruct as run_pipeline

    return run_and_report(
        lambda progress: run_pipeline(images, flags.output, config, options, progress),
        flags.output,
        as_json=flags.as_json,
        quiet=flags.quiet,
    )
