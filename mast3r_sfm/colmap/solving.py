"""Bundle adjustment of a whole reconstruction, once."""

from __future__ import annotations

from collections.abc import Collection

import pycolmap

from mast3r_sfm.colmap.held import Held


def cameras_of(reconstruction: pycolmap.Reconstruction) -> set[int]:
    """Numbers of the cameras that took registered images."""
    return {reconstruction.image(number).camera_id for number in reconstruction.reg_image_ids()}


def solve(
    reconstruction: pycolmap.Reconstruction,
    options: pycolmap.BundleAdjustmentOptions,
    held: Held,
    constant_cameras: Collection[int] = (),
) -> None:
    """Adjust all of a reconstruction in place; principal points stay, unless the options say otherwise.

    Args:
        reconstruction: its observations are all believed.
        options: of bundle adjustment.
        held: what is known.
        constant_cameras: whose intrinsics stay as they are, besides those.
    """
    config = held.configure(reconstruction, constant_cameras)
    pycolmap.create_default_bundle_adjuster(options, config, reconstruction).solve()


def solve_with_shifts(
    reconstruction: pycolmap.Reconstruction,
    options: pycolmap.BundleAdjustmentOptions,
    held: Held,
    shifted: Collection[int],
) -> None:
    """Adjust all of a reconstruction in place, and of some cameras the principal points as well.

    Args:
        reconstruction: its observations are all believed.
        options: of bundle adjustment, for which principal points stay.
        held: what is known.
        shifted: the cameras whose principal points are refined.
    """
    others = cameras_of(reconstruction) - set(shifted)
    if others:
        # pycolmap refines the principal points of all cameras that are not constant, or of none.
        solve(reconstruction, options, held)
    if shifted:
        options.refine_principal_point = True
        solve(reconstruction, options, held, others)
        options.refine_principal_point = False
