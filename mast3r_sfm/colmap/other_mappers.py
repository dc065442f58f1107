"""COLMAP's own mappers, global and incremental, on a database of ours.

They keep COLMAP's defaults, but for what makes the result depend on the machine, and for thresholds in pixels, which
hold at the resolution of matching as ours do.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pycolmap

from mast3r_sfm.colmap.mapper import PARALLEL_RESIDUALS, MapperSettings
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.colmap.observations import one_observation_per_image
from mast3r_sfm.errors import ReconstructionError

MIN_MODEL_SIZE = 2
"""Images of a model of the incremental mapper, which would give none with fewer than ten. The global one needs points
in three."""


def colmap_models(database: Path, settings: MapperSettings) -> list[ColmapModel]:
    """What COLMAP's mapper `settings.config.mapper` makes of a database, largest model first.

    An image may stand in several of the incremental mapper's models.

    Args:
        database: as `write_database` wrote it; it is not changed.
        settings: of mapping; `mapper` must be global or incremental.

    Raises:
        ReconstructionError: the mapper gave up with an error.
    """
    kind = settings.config.mapper
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = (
                pycolmap.global_mapping(database, scratch, scratch, _global_options(settings))
                if kind == "global"
                else pycolmap.incremental_mapping(database, scratch, scratch, _incremental_options(settings))
            )
        except (RuntimeError, ValueError) as error:
            raise ReconstructionError(
                f"COLMAP's {kind} mapper failed on {database}: {error}; use the mapper align instead"
            ) from error
    for reconstruction in found.values():
        one_observation_per_image(pycolmap.ObservationManager(reconstruction), reconstruction)
    models = [ColmapModel(reconstruction) for _, reconstruction in sorted(found.items())]
    return sorted(models, key=lambda model: (-len(model.cam_from_world), -model.num_points))


def _global_options(settings: MapperSettings) -> pycolmap.GlobalPipelineOptions:
    options = pycolmap.GlobalPipelineOptions()
    mapper = options.mapper
    options.random_seed = mapper.random_seed = settings.seed
    # Its positions come from Ceres with as many threads as it is given, which sum up in any order: with one, the same
    # photos give the same model twice.
    options.num_threads = mapper.num_threads = 1
    mapper.bundle_adjustment.ceres.loss_function_scale *= settings.pixel_scale
    mapper.retriangulation.merge_max_reproj_error *= settings.pixel_scale
    mapper.retriangulation.complete_max_reproj_error *= settings.pixel_scale
    return options


def _incremental_options(settings: MapperSettings) -> pycolmap.IncrementalPipelineOptions:
    options = pycolmap.IncrementalPipelineOptions()
    options.random_seed = settings.seed
    options.num_threads = settings.threads
    options.ba_min_num_residuals_for_cpu_multi_threading = PARALLEL_RESIDUALS
    options.min_model_size = MIN_MODEL_SIZE
    options.extract_colors = False  # ours are taken from the photos later
    mapper, triangulation, config = options.mapper, options.triangulation, settings.config
    max_error = config.max_reprojection_error_px * settings.pixel_scale
    mapper.init_max_error = mapper.filter_max_reproj_error = max_error
    mapper.abs_pose_max_error = 3 * max_error
    mapper.filter_min_tri_angle = triangulation.min_angle = config.min_angle_deg
    triangulation.complete_max_reproj_error = triangulation.merge_max_reproj_error = max_error
    return options
