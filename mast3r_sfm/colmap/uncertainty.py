"""How far the observations of a model determine the poses of its images."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pycolmap

from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.colmap.principal_point import MIN_IMAGES, is_centred, residual_variance
from mast3r_sfm.geometry.rigid import camera_centre
from mast3r_sfm.types import Float64

MAX_IMAGES = 300
"""Images of a model beyond which the covariance is not asked for: its time grows with their square."""


def pose_sigmas(model: ColmapModel) -> dict[int, tuple[float, float]] | None:
    """Standard deviations of every registered image's pose, by its number.

    They follow from the normal equations of bundle adjustment (Triggs et al. 2000, 9.4), points and intrinsics
    marginalised. Of all frames that the model could stand in, they hold for the one that disturbs the poses least,
    so that no image is called certain for being the origin. They know of independent errors of the observations
    alone: what errs together, such as a wall taken for another, is not in them.

    Args:
        model: converged; it is not changed.

    Returns:
        rotation in degrees, and position over the largest distance between two cameras; each over all three axes. None
        where the model is too large, or its observations leave more open than a frame.
    """
    numbers = sorted(model.poses())
    if not 2 <= len(numbers) <= MAX_IMAGES:
        return None
    poses = np.array([model.poses()[number] for number in numbers])
    tangent = _covariance(model.reconstruction, [number + 1 for number in numbers])
    if tangent is None or not np.isfinite(tangent).all():
        return None
    centres = camera_centre(poses)
    extent = float(np.linalg.norm(centres[:, None] - centres[None], axis=-1).max())
    if not extent > 0:
        return None
    change = _turns_and_places(poses, extent)
    free = _without_frame(poses, (centres - centres.mean(axis=0)) / extent) @ change
    # Residuals are smaller than errors, since points and poses have followed these.
    observed, unknown = 2 * len(model.tracks().point), 3 * model.num_points + 6 * len(numbers)
    unit = residual_variance(model.reconstruction) * observed / max(observed - unknown, 1)
    variance = unit * ((free @ tangent) * free).sum(axis=1)
    sigma = np.sqrt(variance.clip(min=0).reshape(-1, 2, 3).sum(axis=2))
    return {
        number: (float(np.degrees(turn)), float(place)) for number, (turn, place) in zip(numbers, sigma, strict=True)
    }


def _covariance(reconstruction: pycolmap.Reconstruction, images: list[int]) -> Float64 | None:
    """[6n, 6n] of the poses as pycolmap takes them, for residuals of variance 1 and with the first pose held."""
    trial = pycolmap.Reconstruction(reconstruction)
    trial.tear_down()  # without the images that are not registered, whose poses the covariance would ask for
    options, config = pycolmap.BundleAdjustmentOptions(), pycolmap.BundleAdjustmentConfig()
    options.print_summary = False
    for image in images:
        config.add_image(image)
    # As they were refined: no distortion of cameras of few images, and no principal point that is in the middle.
    taken = Counter(trial.image(image).camera_id for image in images)
    options.refine_extra_params = max(taken.values()) >= MIN_IMAGES
    options.refine_principal_point = not all(is_centred(trial.camera(camera)) for camera in taken)
    # The frame: one pose, and the distance of one point, whose direction one of many observations determines anyway.
    config.set_constant_rig_from_world_pose(trial.image(images[0]).frame_id)
    seen = [keypoint.point3D_id for keypoint in trial.image(images[0]).points2D if keypoint.has_point3D()]
    if not seen:
        return None
    config.add_constant_point(max(seen, key=lambda number: (trial.point3D(number).track.length(), -number)))
    adjuster = pycolmap.create_default_ceres_bundle_adjuster(options, config, trial)
    wanted = pycolmap.BACovarianceOptions()
    wanted.params = pycolmap.BACovarianceOptionsParams.POSES
    covariance = pycolmap.estimate_ba_covariance(wanted, trial, adjuster)
    if covariance is None:
        return None
    whole = np.zeros((len(images), 6, len(images), 6))
    for row, one in enumerate(images[1:], start=1):
        whole[row, :, row] = covariance.get_cam_cov_from_world(one)
        for column, other in enumerate(images[row + 1 :], start=row + 1):
            whole[row, :, column] = covariance.get_cam_cross_cov_from_world(one, other)
            whole[column, :, row] = whole[row, :, column].T
    return whole.reshape(6 * len(images), 6 * len(images))


def _turns_and_places(poses: Float64, extent: float) -> Float64:
    """[6n, 6n] from pycolmap's tangent (half a turn in the camera, shift of the translation) to turns of the camera and
    shifts of its centre in units of the extent."""
    change = np.zeros((len(poses), 6, len(poses), 6))
    for row, pose in enumerate(poses):
        change[row, :3, row, :3] = 2 * np.eye(3)
        # c = −Rᵀ t, and R turns with the camera.
        change[row, 3:, row, :3] = -2 * pose[:, :3].T @ _cross(pose[:, 3]) / extent
        change[row, 3:, row, 3:] = -pose[:, :3].T / extent
    return change.reshape(6 * len(poses), 6 * len(poses))


def _without_frame(poses: Float64, centres: Float64) -> Float64:
    """[6n, 6n] the projection that takes out what a turn, a shift and a scale of the world do to all poses."""
    frame = np.zeros((len(poses), 6, 7))
    frame[:, :3, :3] = -poses[:, :, :3]
    frame[:, 3:, :3] = -np.stack([_cross(centre) for centre in centres])
    frame[:, 3:, 3:6] = np.eye(3)
    frame[:, 3:, 6] = centres
    basis, _ = np.linalg.qr(frame.reshape(-1, 7))
    return np.asarray(np.eye(len(basis)) - basis @ basis.T, np.float64)


def _cross(vector: Float64) -> Float64:
    """[3, 3] whose product with x is vector × x."""
    x, y, z = vector
    return np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
