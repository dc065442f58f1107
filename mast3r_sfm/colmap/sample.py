"""A sample of a model's tracks, by which its cameras are adjusted nearly as well as by all of them.

Bundle adjustment takes as long as there are observations, and poses that are only wanted to go on from need few of
them: long tracks, all over the photos.
"""

from __future__ import annotations

import numpy as np
import pycolmap

from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.geometry.rays import meet_rays
from mast3r_sfm.types import Float64, Int64, Tracks

CELLS = 8
"""Of a photo, along either side."""
LEAST, PER_IMAGE = 6000, 400
"""Observations that a sample has at least, in all and for each image, where there are so many."""


def thinned(reconstruction: pycolmap.Reconstruction, tracks: Tracks) -> pycolmap.Reconstruction:
    """A copy with a sample of its points, of all `tracks`."""
    sizes = np.zeros((tracks.image.max(initial=0) + 1, 2))
    for image in np.unique(tracks.image).tolist():
        camera = reconstruction.camera(reconstruction.image(image + 1).camera_id)
        sizes[image] = camera.width, camera.height
    kept = np.zeros(len(tracks.points), np.bool_)
    kept[spread_points(tracks, sizes)] = True
    sample = pycolmap.Reconstruction(reconstruction)
    for number in np.array(sorted(sample.point3D_ids()), np.int64)[~kept].tolist():
        sample.delete_point3D(number)
    return sample


def spread_points(tracks: Tracks, sizes: Float64) -> Int64:
    """Rows of the points with the longest tracks in each cell of each image.

    As many of each cell as make up enough observations.

    Args:
        tracks: of a model.
        sizes: [N, 2] width and height of the images.
    """
    length = np.bincount(tracks.point, minlength=len(tracks.points))
    cell = (tracks.xy / sizes[tracks.image] * CELLS).astype(np.int64).clip(0, CELLS - 1)
    place = (tracks.image * CELLS + cell[:, 1]) * CELLS + cell[:, 0]
    order = np.lexsort((tracks.point, -length[tracks.point], place))
    begins = np.r_[True, np.diff(place[order]) > 0][: len(order)]
    rank = np.arange(len(order)) - np.flatnonzero(begins)[np.cumsum(begins) - 1]
    best = np.full(len(length), len(order))
    np.minimum.at(best, tracks.point[order], rank)
    wanted = max(LEAST, PER_IMAGE * len(np.unique(tracks.image)))
    taken = np.cumsum(np.bincount(best, length, minlength=1))
    return np.flatnonzero(best <= np.searchsorted(taken, wanted))


def take_over(reconstruction: pycolmap.Reconstruction, sample: pycolmap.Reconstruction) -> None:
    """Give a model's images the poses, and its cameras the parameters, that its sample has."""
    for number in sample.reg_image_ids():
        image = sample.image(number)
        reconstruction.frame(image.frame_id).rig_from_world = sample.frame(image.frame_id).rig_from_world
        reconstruction.camera(image.camera_id).params = list(sample.camera(image.camera_id).params)


def place_points(reconstruction: pycolmap.Reconstruction, tracks: Tracks, scale_px: float) -> None:
    """Move all points to where their rays meet, poses and cameras as they are.

    Args:
        reconstruction: a model.
        tracks: its observations, and where the points were.
        scale_px: photo pixels from which on an observation counts less.
    """
    model = ColmapModel(reconstruction)
    centres, rays = np.zeros((len(tracks.point), 3)), np.zeros((len(tracks.point), 3))
    focal = []
    for image in np.unique(tracks.image).tolist():
        mine = tracks.image == image
        centres[mine], rays[mine] = model.viewing_rays(image, tracks.xy[mine])
        focal.append(reconstruction.camera(reconstruction.image(image + 1).camera_id).mean_focal_length())
    if not focal:
        return
    placed = meet_rays(tracks.points, tracks.point, centres, rays, scale_px / float(np.median(focal)))
    points = reconstruction.points3D
    for number, place in zip(sorted(points.keys()), placed, strict=True):
        points[number].xyz = place
