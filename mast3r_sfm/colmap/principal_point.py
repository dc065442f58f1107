"""Where the principal point of a camera is not in the middle of its photos, and the photos can tell.

Left in the middle, it costs up to 0.2 of AUC@1 on cameras whose sensor is off centre; refined where the photos do
not determine it, it ruins a model. It is therefore refined on a copy first, and taken over for the cameras where its
shift stands out of its own uncertainty.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pycolmap

from mast3r_sfm.colmap.held import Held
from mast3r_sfm.colmap.solving import cameras_of, solve, solve_with_shifts
from mast3r_sfm.types import Float64

MIN_SIGNIFICANCE = 9.0
"""Squared Mahalanobis distance of a small shift from the middle; noise alone exceeds it once in 90 cameras."""
TYPICAL_SHIFT = 0.007
"""Of real cameras, over the long side. The larger a shift is next to it, the more must speak for it: the significance
that is asked for grows by the square of their ratio."""
MAX_UNCERTAINTY = 0.01
"""Standard deviation of the principal point over the long side, above which the photos do not determine it."""
MIN_IMAGES = 4
"""Images that a camera must have taken: with few, the poses and outliers explain any shift."""
MAX_SHIFT = 0.1
"""Shift over the long side beyond which it is taken for a failure rather than for a lens."""
_TRIALS = 2
"""Of confirming shifts: once some are taken back, the others may look different."""


def off_centre_cameras(
    reconstruction: pycolmap.Reconstruction, options: pycolmap.BundleAdjustmentOptions, held: Held
) -> dict[int, Float64]:
    """Refine all principal points on a copy, and find those that are significantly out of the middle.

    Args:
        reconstruction: a converged model; it is not changed.
        options: of bundle adjustment.
        held: what is known; cameras that were given keep their principal points.

    Returns:
        refined parameters of those cameras, by camera id.
    """
    trial = pycolmap.Reconstruction(reconstruction)
    open_cameras = cameras_of(trial) - held.given_cameras
    if not open_cameras:
        return {}
    trial.tear_down()  # without the images that are not registered, whose poses the covariance would ask for
    config = held.configure(trial, held.given_cameras)
    options.refine_principal_point = True
    adjuster = pycolmap.create_default_ceres_bundle_adjuster(options, config, trial)
    options.refine_principal_point = False
    if not adjuster.solve().is_solution_usable():
        return {}
    wanted = pycolmap.BACovarianceOptions()
    wanted.params = pycolmap.BACovarianceOptionsParams.ALL
    covariance = pycolmap.estimate_ba_covariance(wanted, trial, adjuster)
    if covariance is None:
        return {}
    variance = residual_variance(trial)
    taken = Counter(trial.image(image).camera_id for image in trial.reg_image_ids())
    found = {}
    for number in sorted(camera for camera in open_cameras if taken[camera] >= MIN_IMAGES):
        camera = trial.camera(number)
        spread = covariance.get_other_params_cov(camera.params)
        if spread is not None and _is_significant(camera, variance * np.asarray(spread)):
            found[number] = np.array(camera.params)
    return found


def confirmed_shifts(
    sample: pycolmap.Reconstruction, options: pycolmap.BundleAdjustmentOptions, held: Held
) -> frozenset[int]:
    """Bring principal points back to the middle where refined observations do not confirm that they are off it.

    Refined observations err less, but alike where they lie on one surface; so they may only confirm a shift that the
    raw ones, which err independently, showed: one about as far, in about that direction.

    Args:
        sample: adjusted to refined observations; it is adjusted again.
        options: of bundle adjustment.
        held: what is known; cameras that were given keep their principal points.

    Returns:
        the cameras whose principal points stay off the middle.
    """
    open_cameras = cameras_of(sample) - held.given_cameras
    shifted = frozenset(number for number in open_cameras if not is_centred(sample.camera(number)))
    for _ in range(_TRIALS):
        found = off_centre_cameras(sample, options, held) if shifted else {}
        confirmed = frozenset(number for number in found.keys() & shifted if _agrees(sample, number, found[number]))
        if confirmed == shifted:
            break
        for camera in (sample.camera(number) for number in sorted(shifted - confirmed)):
            camera.principal_point_x, camera.principal_point_y = camera.width / 2, camera.height / 2
        solve(sample, options, held)
        shifted = confirmed
    if shifted:
        solve_with_shifts(sample, options, held, shifted)
    return shifted


def _agrees(reconstruction: pycolmap.Reconstruction, number: int, refined: Float64) -> bool:
    """Whether a camera's principal point is nearer to the refined one than to the middle."""
    camera = reconstruction.camera(number)
    held = np.array([camera.principal_point_x, camera.principal_point_y])
    middle = np.array([camera.width, camera.height]) / 2
    return bool(np.linalg.norm(refined[list(camera.principal_point_idxs())] - held) < np.linalg.norm(held - middle))


def is_centred(camera: pycolmap.Camera) -> bool:
    """Whether a camera's principal point is in the middle of its photos."""
    middle = (camera.width / 2, camera.height / 2)
    return bool(np.allclose((camera.principal_point_x, camera.principal_point_y), middle, rtol=0, atol=1e-6))


def _is_significant(camera: pycolmap.Camera, covariance: Float64) -> bool:
    index = list(camera.principal_point_idxs())
    middle = np.array([camera.width, camera.height]) / 2
    shift = np.array(camera.params)[index] - middle
    block = covariance[np.ix_(index, index)]
    long_side = max(camera.width, camera.height)
    if np.sqrt(np.diag(block).max()) > MAX_UNCERTAINTY * long_side or np.abs(shift).max() > MAX_SHIFT * long_side:
        return False
    least = MIN_SIGNIFICANCE + float(((shift / (TYPICAL_SHIFT * long_side)) ** 2).sum())
    return bool(shift @ np.linalg.solve(block, shift) > least)


def residual_variance(reconstruction: pycolmap.Reconstruction) -> float:
    """Variance of one pixel coordinate: the covariance of the solver assumes 1."""
    reconstruction.update_point_3d_errors()
    errors = np.array([point.error for point in reconstruction.points3D.values()])
    # A point's error is the mean length of its residuals; of two Gaussian coordinates that is sqrt(π/2) σ.
    return float(np.median(errors) ** 2 / (np.pi / 2)) if len(errors) else 1.0
