"""Bundle adjustment, once: of a whole reconstruction, or around one image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

import pycolmap

from mast3r_sfm.colmap.held import Held

NEIGHBOURS = 6
"""Images that are adjusted with a new one."""


def cameras_of(reconstruction: pycolmap.Reconstruction, images: Iterable[int] | None = None) -> set[int]:
    """Numbers of the cameras that took some images, by default all that are registered."""
    numbers = reconstruction.reg_image_ids() if images is None else images
    return {reconstruction.image(number).camera_id for number in numbers}


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


def adjust_around(
    reconstruction: pycolmap.Reconstruction, number: int, options: pycolmap.BundleAdjustmentOptions, held: Held
) -> None:
    """Adjust an image that was just registered in place, first alone, then with the images that share most with it.

    So that its error does not spread: adjusted with all at once, the others would give way to it. Cameras that took
    other images as well stay as they are.

    Args:
        reconstruction: the image and its observations are part of it.
        number: of the image.
        options: of bundle adjustment.
        held: what is known.
    """
    shared: Counter[int] = Counter()
    for keypoint in reconstruction.image(number).get_observation_points2D():
        elements = reconstruction.point3D(keypoint.point3D_id).track.elements
        shared.update({element.image_id for element in elements} - {number})
    near = [image for image, _ in sorted(shared.items(), key=lambda item: (-item[1], item[0]))[:NEIGHBOURS]]
    # The two of them that share least hold the frame: its place, and its scale.
    for fixed in (near, near[-2:]):
        images = [number, *near]
        config = pycolmap.BundleAdjustmentConfig()
        for image in images:
            config.add_image(image)
        for image in {*fixed, *(held.poses.keys() & images)}:
            config.set_constant_rig_from_world_pose(reconstruction.image(image).frame_id)
        others = cameras_of(reconstruction, set(reconstruction.reg_image_ids()) - {number})
        for camera in cameras_of(reconstruction, images) & (others | held.fixed_cameras):
            config.set_constant_cam_intrinsics(camera)
        pycolmap.create_default_bundle_adjuster(options, config, reconstruction).solve()
