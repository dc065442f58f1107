"""Which observations of a reconstruction are believed."""

from __future__ import annotations

import numpy as np
import pycolmap

from mast3r_sfm.colmap.held import Held
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.types import Tracks


def drop_misfits(
    reconstruction: pycolmap.Reconstruction, options: pycolmap.IncrementalMapperOptions, held: Held
) -> None:
    """Drop observations that do not fit, and images that hold nothing any more."""
    manager = pycolmap.ObservationManager(reconstruction)
    manager.filter_observations_with_negative_depth()
    manager.filter_all_points3D(options.filter_max_reproj_error, options.filter_min_tri_angle)
    held.drop_empty(manager, reconstruction, options)


def one_observation_per_image(
    manager: pycolmap.ObservationManager, reconstruction: pycolmap.Reconstruction
) -> Tracks | None:
    """Of several keypoints that one image has in a track, keep the one nearest to where the point projects.

    Returns:
        the tracks, if there was nothing to do.
    """
    tracks, numbers = ColmapModel(reconstruction).tracks(), sorted(reconstruction.point3D_ids())
    begins = np.r_[True, (np.diff(tracks.point) > 0) | (np.diff(tracks.image) > 0)][: len(tracks.point)]
    if begins.all():
        return tracks
    for mine in np.split(np.arange(len(begins)), np.flatnonzero(begins)[1:]):
        if len(mine) > 1:
            image, point = int(tracks.image[mine[0]]) + 1, int(tracks.point[mine[0]])
            projected = reconstruction.image(image).project_point(tracks.points[point])
            far = 0 if projected is None else np.linalg.norm(tracks.xy[mine] - projected, axis=1)
            for keypoint in np.delete(tracks.keypoint[mine], np.argmin(far)).tolist():
                if reconstruction.exists_point3D(numbers[point]):
                    manager.delete_observation(image, keypoint)
    return None
